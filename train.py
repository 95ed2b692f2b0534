"""Train a config: python train.py --config=FILE --workdir=DIR."""

# ruff: noqa: E402
import gc

# Imports and traces make many objects that live as long as the process. To
# search them for garbage after every 700 of them takes tenths of a second.
gc.set_threshold(100_000)

import sys

from attention.training.main import main

if __name__ == '__main__':
  sys.exit(main(sys.argv))
