"""Use trained models, estimate a config's cost, and check the installation.

Commands: sample, translate, evaluate, contacts, plot, export, inspect, doctor.
"""

import argparse
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

import attention
from attention import plots
from attention.data import alignments, structures, translation
from attention.data import contacts as contact_maps
from attention.data.files import read_lines, read_text
from attention.ops.platforms import PLATFORMS
from attention.training import (
  command_line,
  tasks,
  trained,
  transformers_folder,
  translate_lines,
)
from attention.training.devices import catalogue, report
from attention.training.main import print_error, set_up_jax
from attention.training.reporting import model_summary
from attention.training.tasks.language import Language
from attention.training.workdir import run_files

_ROWS = 16  # prompts that are continued together
_STRATEGIES = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


def main(argv: list[str] | None = None) -> int:
  """Run a command; returns the exit status, 2 for a usage error."""
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  if rest and arguments.run is not inspect:
    parser.error(f'unrecognized arguments: {" ".join(rest)}')
  arguments.rest = rest
  try:
    return arguments.run(arguments)
  except BrokenPipeError:
    # The reader has closed the pipe; suppress errors of the final flush.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError, NotImplementedError) as error:
    return print_error(error)


def sample(arguments) -> int:
  """Continue a prompt, or each line of a file, with a run's model."""
  task, params = _open(arguments, 'language')
  options = {name: getattr(arguments, name) for name in _STRATEGIES}
  options |= {'seed': arguments.seed, 'stop': tuple(arguments.stop)}
  draft = None
  if arguments.draft is not None:
    small, its_params = _load(arguments.draft, 'language', arguments.dtype)
    draft = options['draft'] = small.as_draft(its_params, arguments.num_draft)
  if arguments.prompts is None:
    prompt = '\n' if arguments.prompt is None else arguments.prompt
    for text in task.stream(params, prompt, arguments.num_tokens, **options):
      print(text, end='', flush=True)
    print()
  else:
    _continue_lines(
      task, params, arguments.prompts, arguments.num_tokens, options
    )
  if draft is not None and draft.accepted:
    mean = sum(draft.accepted) / len(draft.accepted)
    print(
      f'{mean:.2f} of {draft.num_draft} proposals accepted per call',
      file=sys.stderr,
    )
  return 0


def _continue_lines(task, params, path, num_tokens, options):
  prompts = read_lines(path)
  for i, prompt in enumerate(prompts):
    task.encode(f'{path}: line {i + 1}', prompt)
  for i in range(0, len(prompts), _ROWS):
    part = prompts[i : i + _ROWS]
    answers = task.continue_batch(params, part, num_tokens, **options)
    for prompt, answer in zip(part, answers, strict=True):
      line = {'prompt': prompt, 'continuation': answer}
      print(json.dumps(line, ensure_ascii=False), flush=True)


def translate(arguments) -> int:
  """Translate lines from standard input with a run's model."""
  task, params = _open(arguments, 'translation')
  num_refused = translate_lines.answer_lines(
    task,
    params,
    sys.stdin.buffer,
    sys.stdout,
    sys.stderr,
    beam_size=arguments.beam_size,
  )
  return 1 if num_refused else 0


def evaluate(arguments) -> int:
  """Evaluate a model on its run's held-out data, or on given files."""
  files = arguments.source, arguments.target
  if arguments.text is not None:
    text = read_text(arguments.text)
    task, params = _open(arguments, 'language')
    found = task.evaluate_text(params, text, arguments.context_size)
    print(f'{found["loss"]:.4f} nats per token of {found["tokens"]:,.0f}')
    print(f'{found["bits_per_byte"]:.4f} bits per byte of {found["bytes"]:,}')
    return 0
  if arguments.model:
    raise ValueError('--model: requires --text=FILE to evaluate it on')
  if files == (None, None):
    set_up_jax()
    workdir = pathlib.Path(arguments.workdir)
    config = run_files.load_config(workdir)
    task = tasks.create(config, run_files.load_data(workdir))
    params = trained.params(arguments.workdir, task)
    if config.task != 'translation':
      for name, value in task.evaluate(params, jax.device_put).items():
        print(f'{name} {value:.4f}')
      return 0
    parts = {k: v for k, v in task.data.pairs.items() if k != 'train'}
  else:
    if None in files:
      raise ValueError('--source and --target: expected both, or neither')
    parts = {arguments.source: translation.read_pairs(*files)}
    task, params = _open(arguments, 'translation')
  for name, (sources, targets) in parts.items():
    for number, reason in task.refusals(sources).items():
      print(f'{name}: line {number + 1}: {reason}', file=sys.stderr)
    print(f'{name}: {len(sources):,} pairs')
    for line in task.report(params, sources, targets, arguments.beam_size):
      print(f'  {line}', flush=True)
  return 0


def contacts(arguments) -> int:
  """Rank the contacts that a model finds, and compare them to a structure."""
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


def plot(arguments) -> int:
  """Draw a model's attention patterns in a text, as images and a web page."""
  folder = pathlib.Path(arguments.workdir or arguments.model)
  task, params = _open(arguments)
  if not hasattr(task, 'patterns'):
    raise ValueError(f'{folder}: its task does not read text')
  found = task.patterns(
    params,
    arguments.text,
    layers=_numbers_or_names(arguments.layers),
    heads=_numbers(arguments.heads),
  )
  out = folder / 'plots' if arguments.workdir else pathlib.Path('plots')
  out = pathlib.Path(arguments.out or out)
  out.mkdir(parents=True, exist_ok=True)
  numbers = _numbers(arguments.heads)
  for name, (queries, keys, patterns) in found.items():
    layer, heads = plots.rows(patterns)[0]
    shown = f'{layer}, head {numbers[0] if numbers else 0}'
    for kind, figure in (
      (
        'grid',
        plots.pattern_grid(patterns, queries, keys, head_numbers=numbers),
      ),
      (
        'pattern',
        plots.pattern(
          heads[0],
          queries,
          keys,
          queries_as=arguments.queries_as,
          title=shown,
        ),
      ),
      ('flow', plots.flow(heads[0], queries, keys, title=shown)),
    ):
      path = out / f'{name}_{kind}.png'
      figure.savefig(path, dpi=plots.DPI)
      print(path)
    path = out / f'{name}.html'
    title = f'{name} of {folder.name}'
    page = plots.viewer(
      patterns, queries, keys, head_numbers=numbers, title=title
    )
    path.write_text(page, encoding='utf-8')
    print(path)
  return 0


def export(arguments) -> int:
  """Write a run's language model in the format of transformers."""
  task, params = _open(arguments, 'language')
  for line in transformers_folder.save(
    pathlib.Path(arguments.out), task, params
  ):
    print(line)
  return 0


def inspect(arguments) -> int:
  """Report the parameters, FLOPs and memory of a model."""
  if arguments.model:
    if arguments.rest or arguments.device or arguments.decode:
      raise ValueError('--model: expected no other flags')
    fields = transformers_folder.load_fields(arguments.model)
    print(model_summary.inspect(Language(None, fields, None)))
    return 0
  words = [f'--config={arguments.config}', *arguments.rest, '--workdir=unused']
  config = command_line.parse(['inspect', *words]).config
  if arguments.device is None:
    if arguments.decode:
      raise ValueError('--decode: requires --device=…')
    print(model_summary.inspect(tasks.create(config)))
    return 0
  target = catalogue.find(arguments.device)
  task = tasks.create(config)
  lines = (
    report.of_decoding(task, target)
    if arguments.decode
    else report.of_training(config, task, target, arguments.seconds)
  )
  for line in lines:
    print(line, flush=True)
  return 0


def doctor(_) -> int:
  """Print versions, devices and the implementations attention dispatches to."""
  for name, version in run_files.versions().items():
    print(f'{name:<18}{version}')
  print(f'{"backend":<18}{jax.default_backend()}')
  for device in jax.devices():
    print(f'{"device":<18}{device.id}: {device.device_kind}')
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((8, 1024, 8, 64), dtype)
    reasons = attention.explain(x, x, x, is_causal=True)
    print(f'\ncausal attention, {jnp.dtype(dtype).name} [8, 1024, 8, 64]:')
    for implementation, reason in reasons:
      print(f'  {implementation:<16}{reason}')
  print('\nthe same in bfloat16, by platform:')
  for platform in PLATFORMS:
    reasons = attention.explain(x, x, x, is_causal=True, platform=platform)
    chosen = [name for name, reason in reasons if reason == 'chosen']
    print(f'  {platform:<16}{chosen[0]}')
  return 0


def _numbers_or_names(words: str | None):
  if words is None:
    return None
  return [int(w) if w.isdigit() else w for w in words.split(',')]


def _numbers(words: str | None):
  try:
    return None if words is None else [int(w) for w in words.split(',')]
  except ValueError:
    raise ValueError(
      f'heads: expected comma-separated numbers, got {words!r}'
    ) from None


def _open(arguments, kind=None):
  """Load the task of a run or a folder, without data, and its parameters."""
  set_up_jax()
  if getattr(arguments, 'model', None):
    return transformers_folder.load_task(arguments.model, arguments.dtype)
  return trained.load(arguments.workdir, kind)


def _load(path, kind, dtype):
  """As `_open`, of a path that is either."""
  if transformers_folder.is_one(path):
    return transformers_folder.load_task(path, dtype)
  return trained.load(path, kind)


def _add_model(parser):
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


def _parser():
  parser = _Parser(prog='python -m attention', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)

  add = commands.add_parser('sample', help=sample.__doc__)
  _add_model(add)
  prompts = add.add_mutually_exclusive_group()
  prompts.add_argument(
    '--prompt', help='text to continue (default: an empty line)'
  )
  prompts.add_argument(
    '--prompts',
    metavar='FILE',
    help='file with a text to continue on each line; each answer is printed as '
    "a line of JSON, with keys 'prompt' and 'continuation'",
  )
  add.add_argument(
    '--num_tokens',
    type=int,
    default=400,
    help='number of tokens to generate (default: 400)',
  )
  add.add_argument(
    '--temperature',
    type=float,
    default=0.8,
    help='sampling temperature; 0 decodes greedily (default: 0.8)',
  )
  add.add_argument(
    '--top_k', type=int, help='sample from the k most likely tokens'
  )
  add.add_argument(
    '--top_p',
    type=float,
    help='sample from the smallest set of tokens with total probability p',
  )
  add.add_argument(
    '--min_p',
    type=float,
    help='sample from tokens with at least p times the highest probability',
  )
  add.add_argument(
    '--repetition_penalty', type=float, help='above 1: fewer repetitions'
  )
  add.add_argument(
    '--stop',
    action='append',
    default=[],
    metavar='TEXT',
    help='end before this text; may be given several times',
  )
  add.add_argument(
    '--draft',
    metavar='FOLDER',
    help='run or folder of a smaller model with the same vocabulary; its '
    'proposals make sampling faster and do not change its distribution',
  )
  add.add_argument(
    '--num_draft',
    type=int,
    default=4,
    help='number of tokens that it proposes at a time (default: 4)',
  )
  add.add_argument(
    '--seed', type=int, default=0, help='random seed (default: 0)'
  )
  add.set_defaults(run=sample)

  add = commands.add_parser('translate', help=translate.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  _add_beam_size(add)
  add.set_defaults(run=translate)

  add = commands.add_parser('evaluate', help=evaluate.__doc__)
  _add_model(add)
  add.add_argument('--text', help='text file for a language model to predict')
  add.add_argument(
    '--context_size',
    type=int,
    default=0,
    help="tokens of context with --text (default: the model's, up to 1,024)",
  )
  add.add_argument('--source', help='file of source lines, plain or gzip')
  add.add_argument('--target', help='file of their translations, line by line')
  _add_beam_size(add)
  add.set_defaults(run=evaluate)

  add = commands.add_parser('contacts', help=contacts.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument(
    '--alignment',
    help="alignment file, for a run of task 'msa' (default: its first held-out "
    'family)',
  )
  add.add_argument(
    '--structure', default='', help='PDB or mmCIF file to compare to'
  )
  add.add_argument(
    '--chain', default='', help='its chain (default: the only one)'
  )
  add.add_argument(
    '--out',
    help="file for the ranked pairs, in CASP's RR format, or CSV if it ends in "
    ".csv (default: the run's contacts.rr)",
  )
  add.set_defaults(run=contacts)

  add = commands.add_parser('plot', help=plot.__doc__)
  _add_model(add)
  add.add_argument(
    '--text',
    required=True,
    help="input text; for a run of task 'msa', an alignment file",
  )
  add.add_argument(
    '--layers', help='numbers or paths, such as 0,2 (default: all)'
  )
  add.add_argument('--heads', help='numbers, such as 0,3 (default: all)')
  add.add_argument(
    '--queries_as',
    default='rows',
    help='rows or columns, in the image of a single pattern, which shows the '
    'first selected head of the lowest selected layer (default: rows)',
  )
  add.add_argument(
    '--out',
    help="folder for the files (default: the run's plots/; for --model, "
    'plots/)',
  )
  add.set_defaults(run=plot)

  add = commands.add_parser('export', help=export.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument(
    '--out', required=True, help='folder for the files, new or empty'
  )
  add.set_defaults(run=export)

  add = commands.add_parser('inspect', help=inspect.__doc__)
  what = add.add_mutually_exclusive_group(required=True)
  what.add_argument(
    '--config', help='config file; --config.KEY=VALUE overrides its keys'
  )
  what.add_argument(
    '--model', metavar='FOLDER', help='folder of a model of transformers'
  )
  add.add_argument(
    '--device',
    help='compile the training step for h100, a100:8, v5e:4x4, …, which need '
    'not be attached, and report its memory and operations per device',
  )
  add.add_argument(
    '--decode',
    action='store_true',
    help='compile decoding instead of training',
  )
  add.add_argument(
    '--seconds',
    type=float,
    default=50,
    help='time budget for finding the largest batch that fits (default: 50)',
  )
  add.set_defaults(run=inspect)

  add = commands.add_parser('doctor', help=doctor.__doc__)
  add.set_defaults(run=doctor)
  return parser


def _add_beam_size(parser):
  parser.add_argument(
    '--beam_size',
    type=int,
    default=5,
    help='beam size; 1 decodes greedily (default: 5)',
  )


class _Parser(argparse.ArgumentParser):
  """A parser that reports a usage error in one line."""

  def error(self, message):
    self.exit(2, f'error: {message} (see {self.prog} --help)\n')


if __name__ == '__main__':
  sys.exit(main())
