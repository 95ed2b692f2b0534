"""Continue a prompt, or each line of a file, with a run's model."""

import json
import sys

import jax

from attention.commands import trained_models
from attention.data.files import read_lines
from attention.training.parallelism import sharding

_ROWS = 16  # prompts that are continued together
_STRATEGIES = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  trained_models.add_flags(parser)
  trained_models.add_weights(parser)
  prompts = parser.add_mutually_exclusive_group()
  prompts.add_argument(
    '--prompt', help='text to continue (default: a line break)'
  )
  prompts.add_argument(
    '--prompts',
    metavar='FILE',
    help='file with a text to continue on each line; each answer is printed as '
    "a line of JSON, with keys 'prompt' and 'continuation'",
  )
  parser.add_argument(
    '--num_tokens',
    type=int,
    default=400,
    help='number of tokens to generate (default: 400)',
  )
  parser.add_argument(
    '--temperature',
    type=float,
    default=0.8,
    help='sampling temperature; 0 decodes greedily (default: 0.8)',
  )
  parser.add_argument(
    '--top_k', type=int, help='sample from the k most likely tokens'
  )
  parser.add_argument(
    '--top_p',
    type=float,
    help='sample from the smallest set of tokens with total probability p',
  )
  parser.add_argument(
    '--min_p',
    type=float,
    help='sample from tokens with at least p times the highest probability',
  )
  parser.add_argument(
    '--repetition_penalty', type=float, help='above 1: fewer repetitions'
  )
  parser.add_argument(
    '--stop',
    action='append',
    default=[],
    metavar='TEXT',
    help='end before this text; may be given several times',
  )
  parser.add_argument(
    '--draft',
    metavar='FOLDER',
    help='run or folder of a smaller model with the same vocabulary; its '
    'proposals make sampling faster and do not change its distribution',
  )
  parser.add_argument(
    '--num_draft',
    type=int,
    default=4,
    help='number of tokens that it proposes at a time (default: 4)',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='random seed (default: 0)'
  )


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  task, params = trained_models.open_task(arguments, 'language')
  options = {name: getattr(arguments, name) for name in _STRATEGIES}
  options |= {'seed': arguments.seed, 'stop': tuple(arguments.stop)}
  draft = None
  if arguments.draft is not None:
    small, its_params = trained_models.load(
      arguments.draft, 'language', arguments.dtype
    )
    draft = options['draft'] = small.as_draft(its_params, arguments.num_draft)
  if arguments.prompts is None:
    prompt = arguments.prompt
    if prompt is None:
      prompt = task.default_prompt
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


def _share(task, params, draft, prompts):
  """Replicate parameters over the devices that share prompts."""
  devices = jax.devices()
  if not task.has_cache or len(prompts) < 2:
    devices = devices[:1]
  over = sharding.replicated(sharding.make_mesh(_ROWS, devices=devices))
  if draft is not None:
    draft.params = jax.device_put(draft.params, over)
  return jax.device_put(params, over)


def _continue_lines(task, params, path, num_tokens, options):
  prompts = read_lines(path)
  for i, prompt in enumerate(prompts):
    task.encode(f'{path}: line {i + 1}', prompt)
  params = _share(task, params, options.get('draft'), prompts)
  for i in range(0, len(prompts), _ROWS):
    part = prompts[i : i + _ROWS]
    answers = task.continue_batch(params, part, num_tokens, **options)
    for prompt, answer in zip(part, answers, strict=True):
      line = {'prompt': prompt, 'continuation': answer}
      print(json.dumps(line, ensure_ascii=False), flush=True)
