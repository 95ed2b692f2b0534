"""Runs: the only room that knows what a run is."""
