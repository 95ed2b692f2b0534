"""python -m attention inspect, against known numbers and real models."""

import subprocess
import sys

import jax
import pytest

import attention.__main__ as cli
from attention.modules import lora
from attention.training import command_line, tasks
from attention.training.reporting import flops, model_summary


def _inspect(capsys, *words):
  assert cli.main(['inspect', *words]) == 0
  return capsys.readouterr().out


def _row(text, start):
  (line,) = [x for x in text.split('\n') if x.strip().startswith(start)]
  return line


def test_gpt3_is_counted_exactly(capsys):
  text = _inspect(capsys, '--config=configs/gpt3.py')
  for start, end in (
    ('query, per head', '12288 × 128           1,572,864'),
    ('key, per head', '12288 × 128           1,572,864'),
    ('value, per head', '12288 × 128           1,572,864'),
    ('output, per head', '128 × 12288           1,572,864'),
    ('one head', ' 6,291,456'),
    ('96 heads, per layer', ' 603,979,776'),
    ('96 layers', ' 57,982,058,496'),
    ('full-rank value map', '12288 × 12288         150,994,944'),
    ('factorised', ' 3,145,728'),
    ('57,982,058,496 of 174,604,259,328', '33.2% of 175 billion)'),
  ):
    assert _row(text, start).endswith(end)
  row = _row(text, 'gpt/block_0…95/attention/query/w').split()
  assert row[-4:] == ['150,994,944', '96', '14,495,514,624', '28,991,029,248']


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_llama_is_counted_as_published(capsys):
  text = _inspect(capsys, '--config=configs/llama3_8b.py')
  assert '8,030,261,248' in _row(text, 'total')


def test_gpt3_takes_seconds_and_little_memory():
  # Measure CPU time, which other processes do not affect, and VmHWM, because
  # ru_maxrss is inherited from the parent process.
  script = (
    'import sys, time; from attention.__main__ import main;'
    "main(['inspect', '--config=configs/gpt3.py']);"
    "status = open('/proc/self/status').read().split();"
    "kib = status[status.index('VmHWM:') + 1];"
    'print(time.process_time(), kib, file=sys.stderr)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], check=True, capture_output=True, text=True
  )
  seconds, kib = map(float, done.stderr.split()[-2:])
  assert seconds < 10
  assert kib < 2**20


@pytest.mark.parametrize('is_tied', [True, False])
def test_counts_match_the_model(is_tied):
  config = command_line.load_config('configs/gpt_char.py:debug')
  config.model.with_tied_output = is_tied
  task = tasks.create(config)
  text = model_summary.inspect(task)
  params = jax.eval_shape(task.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  assert _row(text, 'total').split()[1] == f'{count:,}'
  # By hand, for width 16, 2 layers, 16 keys and v symbols: 12 · 16² parameters
  # per layer in attention and feed-forward, 16 v in the output; then products
  # with 16 keys and 16 values.
  symbols = task.vocabulary.size
  flops = 2 * (2 * 12 * 16**2 + 16 * symbols) + 2 * 2 * 16 * (16 + 16)
  assert _row(text, 'total').split()[2] == f'{flops:,}'


def test_frozen_parameters_have_neither_gradients_nor_moments():
  config = command_line.load_config('configs/gpt_char.py:debug')
  config.model.lora = {'rank': 1}
  task = tasks.create(config)
  whole = flops.count_step(task, task.batch(0))
  task.is_trained = lora.is_adapter
  text = model_summary.inspect(task)
  # Rank 1: inputs and outputs of four layers in each of two blocks.
  trained = 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
  share = trained / int(_row(text, 'total').split()[1].replace(',', ''))
  assert _row(text, 'trained').split() == [
    'trained', 'parameters', str(trained), f'({share:.2%})'
  ]  # fmt: skip
  # A step multiplies each frozen matrix twice, once in each direction.
  assert 2 / 3 * whole < flops.count_step(task, task.batch(0)) < 0.8 * whole


def test_inspect_accepts_overrides_and_reports_errors_in_one_line(capsys):
  words = ('--config=configs/gpt3.py:debug', '--config.model.num_layers=3')
  assert 'gpt/block_0…2/attention' in _inspect(capsys, *words)
  for words, message in (
    (['--config=no.py'], 'no.py: No such file'),
    (['--config=configs/gpt3.py', '--config.model.x=1'], 'no such key'),
    (['--config=configs/gpt3.py', '--config.model.num_heads=7'], 'divisor'),
    (['--config=configs/gpt3.py', '--config.model.vocab_size=9'], 'at least'),
  ):
    assert cli.main(['inspect', *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
  with pytest.raises(SystemExit, match='2'):
    cli.main(['doctor', '--config=x'])
