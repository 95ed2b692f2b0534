"""The model that a command uses: its flags, loading it, where figures go."""

import pathlib

from attention.modules import layers
from attention.training import trained, transformers_folder
from attention.training.main import set_up_jax


def add_flags(parser):
  """Add --workdir and --model, of which one is required."""
  group = parser.add_mutually_exclusive_group(required=True)
  group.add_argument('--workdir', help='folder of the run')
  group.add_argument(
    '--model',
    metavar='FOLDER',
    help='folder of a language model of transformers: config.json, '
    '*.safetensors, tokenizer.json',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16', 'float16'),
    help="dtype of --model's parameters (default: that of its files)",
  )


def add_weights(parser) -> None:
  """Add --weights, which `open_task` reads."""
  parser.add_argument(
    '--weights',
    choices=('float32', 'bfloat16'),
    help='dtype in which the weights of linear layers are kept; in bfloat16, a '
    'CPU decodes faster (default: as they were saved)',
  )


def add_beam_size(parser) -> None:
  """Add --beam_size."""
  parser.add_argument(
    '--beam_size',
    type=int,
    default=5,
    help='beam size; 1 decodes greedily (default: 5)',
  )


def add_out(parser) -> None:
  """Add --out, of `plots_folder`."""
  parser.add_argument(
    '--out',
    help="folder for the files (default: the run's plots/; for --model, "
    'plots/)',
  )


def plots_folder(arguments) -> pathlib.Path:
  """The folder for figures, which is created."""
  run = pathlib.Path(arguments.workdir or '')
  folder = pathlib.Path(arguments.out or run / 'plots')
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def open_task(arguments, kind=None):
  """Load the task of a run or a folder, without data, and its parameters."""
  set_up_jax()
  if getattr(arguments, 'model', None):
    task, params = transformers_folder.load_task(
      arguments.model, arguments.dtype
    )
  else:
    task, params = trained.load(arguments.workdir, kind)
  return task, with_weights(arguments, params)


def with_weights(arguments, params):
  """Keep the weights of linear layers in the dtype of --weights."""
  if getattr(arguments, 'weights', None) is None:
    return params
  return layers.cast_weights(params, arguments.weights)


def load(path, kind, dtype):
  """As `open_task`, of a path that is either."""
  if transformers_folder.is_one(path):
    return transformers_folder.load_task(path, dtype)
  return trained.load(path, kind)
