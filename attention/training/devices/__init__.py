"""What a config's programs take of devices, none of which has to be attached.

`report` compiles them for a device that `catalogue` describes, and counts.
"""
