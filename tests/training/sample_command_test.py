"""python -m attention sample: files of prompts, stops and drafts."""

import json

import pytest

from attention import __main__ as cli
from attention.training import loop, trained


def test_each_line_of_a_file_is_continued_as_json(ended, tmp_path, capsys):
  path = tmp_path / 'prompts.txt'
  prompts = ['the lazy', 'a', 'quick brown fox jumps']
  path.write_text('\n'.join(prompts) + '\n')
  words = ['sample', f'--workdir={ended}', '--num_tokens=9', '--temperature=0']
  capsys.readouterr()
  assert cli.main([*words, f'--prompts={path}']) == 0
  lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
  assert [line['prompt'] for line in lines] == prompts
  for line in lines:
    assert cli.main([*words, f'--prompt={line["prompt"]}']) == 0
    alone = capsys.readouterr().out
    assert alone == line['prompt'] + line['continuation'] + '\n'

  path.write_text('the\nTHE\n')
  assert cli.main([*words, f'--prompts={path}']) == 2
  assert f"{path}: line 2: symbols 'EHT'" in capsys.readouterr().err
  path.write_text('the\n\nfox\n')
  assert cli.main([*words, f'--prompts={path}']) == 2
  assert 'line 2: expected at least one symbol' in capsys.readouterr().err


def test_a_text_ends_before_the_first_stop(ended, capsys):
  words = ['sample', f'--workdir={ended}', '--num_tokens=30', '--prompt=fox']
  capsys.readouterr()
  assert cli.main(words) == 0
  whole = capsys.readouterr().out[:-1]
  stops = [whole[20:22], whole[12:15]]
  assert cli.main([*words, *(f'--stop={stop}' for stop in stops)]) == 0
  first = min(whole.index(stop, 3) for stop in stops)
  assert capsys.readouterr().out == whole[:first] + '\n'


def test_weights_in_bfloat16_are_those_rounded(ended, tmp_path, capsys):
  path = tmp_path / 'text.txt'
  path.write_text('the quick brown fox ' * 20)
  losses = []
  for more in ((), ('--weights=float32',), ('--weights=bfloat16',)):
    words = ['evaluate', f'--workdir={ended}', f'--text={path}', *more]
    capsys.readouterr()
    assert cli.main(words) == 0
    losses.append(float(capsys.readouterr().out.split()[0]))
  assert losses[0] == losses[1]
  assert losses[2] == pytest.approx(losses[0], abs=0.01)
  words = ['sample', f'--workdir={ended}', '--num_tokens=9', more[0]]
  assert cli.main(words) == 0


def test_a_draft_leaves_greedy_text_as_it_is(ended, config, tmp_path, capsys):
  words = ['sample', f'--workdir={ended}', '--num_tokens=9', '--temperature=0']
  capsys.readouterr()
  assert cli.main(words) == 0
  expected = capsys.readouterr().out
  assert cli.main([*words, f'--draft={ended}', '--num_draft=2']) == 0
  printed = capsys.readouterr()
  assert printed.out == expected
  assert '2.00 of 2 proposals accepted per call' in printed.err

  other = tmp_path / 'other'
  loop.train(config(**{'training.steps': 1, 'data.level': 'bytes'}), other)
  capsys.readouterr()
  assert cli.main([*words, f'--draft={other}']) == 2
  size = trained.load(ended)[0].vocabulary.size
  message = f'vocabulary of {size} tokens, got another, of 256'
  assert message in capsys.readouterr().err


# Runs the command, and reports the rows of each piece and of its first shard.
_SAMPLE = """
import sys
from attention import __main__ as cli
from attention.training.tasks import generation

write = generation._Writer.write
def reporting(self, rows, *more):
  piece = write(self, rows, *more)
  own = len(piece.addressable_shards[0].data)
  print(f'{len(rows)} rows, {own} on each device', file=sys.stderr)
  return piece
generation._Writer.write = reporting
sys.exit(cli.main(sys.argv[1:]))
"""


def test_devices_share_prompts(ended, tmp_path, python, monkeypatch):
  path = tmp_path / 'prompts.txt'
  path.write_text('the lazy\na\nquick brown fox jumps\n')
  words = ['sample', f'--workdir={ended}', f'--prompts={path}', '--seed=3']
  answers = []
  for count, shared in ((1, '3 rows, 3'), (2, '4 rows, 2')):
    flags = f'--xla_force_host_platform_device_count={count}'
    monkeypatch.setenv('XLA_FLAGS', flags)
    process = python('-c', _SAMPLE, *words, '--num_tokens=9')
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert f'{shared} on each device' in error
    answers.append(output)
  assert answers[0] == answers[1]
