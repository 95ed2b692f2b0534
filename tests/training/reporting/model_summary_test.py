"""python -m attention inspect: figures that are known, and those of a model."""

import subprocess
import sys

import jax
import pytest

import attention.__main__ as cli
from attention.training import command_line, tasks
from attention.training.reporting import model_summary


def _inspect(capsys, *words):
  assert cli.main(['inspect', *words]) == 0
  return capsys.readouterr().out


def _row(text, start):
  (line,) = [x for x in text.split('\n') if x.strip().startswith(start)]
  return line


def test_gpt3_is_counted_exactly(capsys):
  text = _inspect(capsys, '--config=configs/gpt3.py')
  for start, end in (
    ('query, a head', '12288 × 128           1,572,864'),
    ('key, a head', '12288 × 128           1,572,864'),
    ('value, a head', '12288 × 128           1,572,864'),
    ('output, a head', '128 × 12288           1,572,864'),
    ('a head: all', ' 6,291,456'),
    ("a layer's 96 heads", ' 603,979,776'),
    ('96 layers', ' 57,982,058,496'),
    ('a value map of full rank', '12288 × 12288         150,994,944'),
    ('factorised', ' 3,145,728'),
    ('57,982,058,496 of 174,604,259,328', '33.2% of 175 billion)'),
  ):
    assert _row(text, start).endswith(end)
  row = _row(text, 'gpt/block_0…95/attention/query/w').split()
  assert row[-4:] == ['150,994,944', '96', '14,495,514,624', '28,991,029,248']


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_gpt3_takes_seconds_and_little_memory():
  # Of the processor: a clock on the wall would tell of other work too. And
  # ru_maxrss would tell of the process that started this one.
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
def test_what_is_counted_is_what_is_made(is_tied):
  config = command_line.load_config('configs/gpt_char.py:debug')
  config.model.with_tied_output = is_tied
  task = tasks.create(config)
  text = model_summary.inspect(config, task)
  params = jax.eval_shape(task.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  assert _row(text, 'all').split()[1] == f'{count:,}'
  # Of width 16, 2 layers, 16 keys, v symbols, by hand: attention's and the
  # feed-forward's 12 · 16² parameters a layer, the output's 16 v; then products
  # with 16 keys and 16 values.
  symbols = task.vocabulary.size
  flops = 2 * (2 * 12 * 16**2 + 16 * symbols) + 2 * 2 * 16 * (16 + 16)
  assert _row(text, 'all').split()[2] == f'{flops:,}'


def test_keys_of_a_config_are_changed_and_mistakes_are_one_line(capsys):
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
