"""Implementations of attention and the rules for choosing one by platform."""
