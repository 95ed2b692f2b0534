"""Translation runs: training, translating lines, evaluation, errors."""

import io
import shutil

import jax
import numpy as np
import pytest

from attention import __main__ as cli
from attention.commands import translate
from attention.training import loop, tasks, trained
from attention.training.command_line import load_config
from attention.training.workdir import metrics

_WORDS = ('rot', 'gelb', 'blau', 'rund', 'eckig')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """Aligned files: lines of words, and the same lines with words reversed."""
  folder = tmp_path_factory.mktemp('pairs')
  rng = np.random.default_rng(0)
  lines = [rng.choice(_WORDS, rng.integers(1, 7)) for _ in range(80)]
  for name, part in (('train', lines), ('val', lines[:9])):
    text = [' '.join(words) for words in part]
    (folder / f'{name}.a').write_text('\n'.join(text) + '\n')
    text = [' '.join(words[::-1]) for words in part]
    (folder / f'{name}.b').write_text('\n'.join(text) + '\n')
  return folder


def _config(pairs, **changes):
  config = load_config('configs/translate.py:debug')
  config.data.update(
    {
      'path': str(pairs / 'train.a'),
      'target_path': str(pairs / 'train.b'),
      'validation_path': str(pairs / 'val.a'),
      'validation_target_path': str(pairs / 'val.b'),
      'max_length': 20,
    }
  )
  config.training.update(
    {
      'steps': 4,
      'log_every': 1,
      'eval_every': 4,
      'checkpoint_every': 2,
      'tensorboard': False,
    }
  )
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def run(pairs, tmp_path_factory):
  """The workdir of a short run."""
  workdir = tmp_path_factory.mktemp('runs') / 'translate'
  loop.train(_config(pairs), workdir)
  return workdir


def test_a_run_evaluates_plots_and_writes_examples(run):
  lines = metrics.read(run / 'metrics.jsonl')
  last = {k: v for line in lines for k, v in line.items()}
  assert 0 < last['eval/loss'] < np.log(300) * 1.2
  assert 0 <= last['eval/bleu'] <= 100
  for n in (0, 1):
    picture = run / 'plots' / f'cross_attention_{n}.png'
    assert picture.read_bytes().startswith(b'\x89PNG')
  assert (run / 'samples' / '00000004.txt').read_text().count('answer') == 5


class _Lines(io.BytesIO):
  """Standard input from a pipe or a terminal."""

  def __init__(self, content, is_terminal=False):
    super().__init__(content)
    self.isatty = lambda: is_terminal


def _answer(run, content, beam_size=2, is_terminal=False):
  task, params = trained.load(run, 'translation')
  output, errors = io.StringIO(), io.StringIO()
  refused = translate.answer_lines(
    task,
    params,
    _Lines(content, is_terminal),
    output,
    errors,
    beam_size=beam_size,
  )
  return refused, output.getvalue().split('\n'), errors.getvalue()


def test_each_line_gets_an_answer_or_a_reason(run):
  content = b'rot blau\n\n' + b'rund ' * 40 + b'\ngelb \xff\neckig'
  refused, answers, errors = _answer(run, content)
  assert refused == 2
  assert len(answers) == 6 and answers[-1] == ''
  assert answers[1] == answers[2] == answers[3] == ''
  assert 'line 3: ' in errors and 'accepts at most 20' in errors
  assert 'line 4: not UTF-8 at byte 5 (0xff)' in errors
  # Answers do not depend on the other lines of a batch.
  assert _answer(run, b'eckig\n')[1][0] == answers[4]


def test_the_mesh_of_a_run_is_not_that_of_translations(run):
  task, params = trained.load(run, 'translation')
  sources = ['rot blau', 'gelb'] * 2
  expected = task.translate(params, sources)
  names = ('data', 'fsdp', 'tensor', 'context', 'pairs')
  mesh = jax.sharding.AbstractMesh((2, 1, 1, 1, 1), names)
  with jax.sharding.use_abstract_mesh(mesh):
    assert task.translate(params, sources) == expected
    assert task.patterns(params, 'rot blau')['cross_attention']


def test_only_a_terminal_gets_a_prompt(run):
  assert _answer(run, b'rot\n', 1, is_terminal=True)[2].startswith('> ')
  assert _answer(run, b'rot\n', 1)[2] == ''
  assert _answer(run, b'', 1)[1] == ['']


def _main(capsys, *words):
  status = cli.main([str(word) for word in words])
  printed = capsys.readouterr()
  return status, printed.out, printed.err


def test_evaluate_prints_loss_and_bleu_with_signature(run, pairs, capsys):
  status, out, _ = _main(capsys, 'evaluate', f'--workdir={run}')
  assert status == 0
  assert 'validation: 9 pairs' in out
  assert 'loss ' in out and 'case:mixed' in out and 'case:lc' in out
  status, again, _ = _main(
    capsys,
    'evaluate',
    f'--workdir={run}',
    f'--source={pairs / "val.a"}',
    f'--target={pairs / "val.b"}',
  )
  assert status == 0
  assert again.split('\n')[1:] == out.split('\n')[1:]


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['translate', '--beam_size=1000'], 'beam_size: expected 1 to 2'),
    (['sample'], "expected a run of task 'language', got one of"),
    (['evaluate', '--source=x'], '--source and --target: expected both'),
    (['evaluate', '--source=x', '--target=y'], 'x: No such file'),
  ],
)
def test_errors_are_one_line(run, capsys, monkeypatch, words, message):
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(_Lines(b'rot\n')))
  status, _, err = _main(capsys, *words, f'--workdir={run}')
  assert status == 2
  assert message in err and err.count('\n') == 1


def test_files_with_different_line_counts_raise_before_compiling(
  pairs, tmp_path
):
  short = tmp_path / 'short'
  short.write_text('rot\n')
  config = _config(pairs, **{'data.target_path': str(short)})
  with pytest.raises(ValueError, match='expected .* lines to match'):
    loop.prepare(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_bytes(run, pairs, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(run, copy)
  shutil.rmtree(copy / 'checkpoints' / '4')
  loop.train(_config(pairs), copy)
  for name in ('metrics.jsonl', 'samples/00000004.txt'):
    one, two = ((d / name).read_text() for d in (run, copy))
    drop = ('second',)
    assert [x for x in one.split(',') if not any(d in x for d in drop)] == [
      x for x in two.split(',') if not any(d in x for d in drop)
    ]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dates', 'tones', 'translate'])
def test_each_config_trains_at_debug(name, tmp_path):
  config = load_config(f'configs/{name}.py:debug')
  config.training.update({'steps': 3, 'eval_every': 3, 'tensorboard': False})
  loop.train(config, tmp_path / 'run')
  lines = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  last = {k: v for line in lines for k, v in line.items()}
  assert 0 <= last['eval/accuracy'] <= 1
  assert ('eval/accuracy_unseen' in last) == (name != 'tones')
  loaded = tasks.load(config, tmp_path / 'run')
  assert loaded.vocabulary == tasks.create(config).vocabulary
  assert loaded.model_fields['vocab_size'] == loaded.vocabulary.size
