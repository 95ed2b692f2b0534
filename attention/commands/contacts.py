"""Rank the contacts that a model finds, and compare them to a structure."""

import pathlib

from attention import plots
from attention.data import alignments, structures
from attention.data import contacts as contact_maps
from attention.training import tasks, trained
from attention.training.main import set_up_jax
from attention.training.workdir import run_files


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  parser.add_argument('--workdir', required=True, help='folder of the run')
  parser.add_argument(
    '--alignment',
    help="alignment file, for a run of task 'msa' (default: its first held-out "
    'family)',
  )
  parser.add_argument(
    '--structure', default='', help='PDB or mmCIF file to compare to'
  )
  parser.add_argument(
    '--chain', default='', help='its chain (default: the only one)'
  )
  parser.add_argument(
    '--out',
    help="file for the ranked pairs, in CASP's RR format, or CSV if it ends in "
    ".csv (default: the run's contacts.rr)",
  )


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  set_up_jax()
  workdir = pathlib.Path(arguments.workdir)
  config = run_files.load_config(workdir)
  if config.task not in ('contacts', 'msa'):
    raise ValueError(
      f"{workdir}: expected a run of task 'contacts' or 'msa', got one of "
      f'{config.task!r}'
    )
  given = []
  if arguments.alignment:
    if config.task == 'contacts':
      raise ValueError(
        f'--alignment: {workdir} is a model of one alignment, '
        f'{config.data.path or "a generated one"}; train on the other, or use '
        "a run of task 'msa'"
      )
    given = [alignments.read(arguments.alignment)]
    task = tasks.load(config, workdir)
  else:
    task = tasks.create(config, run_files.load_data(workdir))
  alignment = given[0] if given else task.alignment
  known = alignment.contacts
  if arguments.structure:
    known = contact_maps.of_distances(
      structures.distances(
        arguments.structure, arguments.chain, alignment.query
      )
    )
  scores = task.scores(trained.params(workdir, task), *given)
  if known is not None:
    baseline = contact_maps.precisions(
      contact_maps.mean_field_dca(alignment.residues, alignment.weights), known
    )
    for name, value in contact_maps.precisions(scores, known).items():
      print(f'{name} {value:.2f} (mean-field DCA {baseline[name]:.2f})')
  out = pathlib.Path(arguments.out or workdir / 'contacts.rr')
  contact_maps.write(out, alignment.query, scores)
  print(out)
  path = workdir / 'plots' / 'contacts.png'
  plots.contact_map(
    scores, known, path, title=pathlib.Path(alignment.name).name
  )
  print(path)
  return 0
