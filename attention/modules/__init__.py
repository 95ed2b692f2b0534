"""Haiku modules, for anyone's model: import them as `attention.X`."""
