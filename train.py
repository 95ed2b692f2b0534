"""Train a config: python train.py --config=FILE --workdir=DIR."""

import sys

from attention.training.main import main

if __name__ == '__main__':
  sys.exit(main(sys.argv))
