"""Interoperability with other projects' code and weights."""
