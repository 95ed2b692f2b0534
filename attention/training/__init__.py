"""Training runs: tasks, the training loop and the command line."""
