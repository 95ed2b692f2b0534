"""Bridges to code and weights that others made: one file for each."""
