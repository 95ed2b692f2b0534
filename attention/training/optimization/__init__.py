"""The training step: gradients, optimizer, precision, non-finite steps."""
