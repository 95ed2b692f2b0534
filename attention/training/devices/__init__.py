"""The cost of a config's programs on devices that need not be attached.

`report` compiles the programs for a device described by `catalogue`, and counts
their memory, kernels and collectives.
"""
