"""The commands of python -m attention."""
