"""python -m attention study, and what it shows."""

import re

import jax
import numpy as np
import pytest

import attention.__main__ as cli
from attention import analysis
from attention.capture import capture
from attention.data.subwords import Subwords
from attention.data.vocabularies import Characters
from attention.interop import transformers
from attention.training import trained
from attention.training.tasks.language import Language
from attention.training.tasks.study import repeated_tokens
from attention.training.workdir import run_files

_FIELDS = dict(context_size=12, num_layers=2, num_heads=3, model_size=12)
_GEMMA = dict(
  norm='both', norm_kind='zero_centred_rms', output_logit_cap=2.0, vocab_size=20
)
_ROW = re.compile(r'^ *(\d+) +(\d+) ((?: +(?:–|\d+\.\d{3}\*?)){6}) *$', re.M)


def _params(task):
  """Random ones, far from where a model starts."""
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.RandomState(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype('f'), shapes
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    _GEMMA,
    {'norm': 'post', 'positions': 'rotary', 'use_scan': True},
    {
      'with_tied_output': False,
      'lora': {'rank': 2, 'alpha': 3.0, 'projections': ('output', 'linear')},
    },
  ],
  ids=['plain', 'gemma', 'post', 'lora'],
)
def test_a_study_is_what_analysis_says(changes, assert_close):
  task = Language(Characters('abcdefgh'), {**_FIELDS, **changes}, None)
  params = _params(task)
  tokens = task.encode('text', 'abcabfga')
  study = task.study(params, tokens)
  run = jax.jit(lambda params: capture(task._model, params, tokens, what=kinds))
  kinds = 'pattern', 'head_output'
  logits, found = run(params)
  for layer, (pattern, output) in enumerate(
    zip(*(found[kind].values() for kind in kinds), strict=True)
  ):
    norms = np.linalg.norm(output[0], axis=-1).T
    expected = (
      analysis.induction(pattern, tokens)[0],
      analysis.duplicate_token(pattern, tokens)[0],
      analysis.previous_token(pattern)[0],
      analysis.first_token(pattern)[0],
      analysis.entropy(pattern)[0].mean(-1),
      norms.mean(-1),
    )
    assert_close(study.scores[:, layer], np.stack(expected))
    assert_close(study.patterns[layer], pattern[0])
    assert_close(study.norms[layer], norms)
  assert study.tokens == list('abcabfga')

  # The lens of the last layer is the model, without what no token has.
  logits = np.asarray(logits[0, :, :8], np.float64)
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  assert len(study.guesses) == 2
  for guesses, share in zip(study.guesses[-1], shares, strict=True):
    best = np.argsort(-share)[:5]
    assert [token for token, _ in guesses] == ['abcdefgh'[i] for i in best]
    assert_close(np.float32([p for _, p in guesses]), share[best], scale=9)
  if changes.get('norm'):
    assert study.parts == {}
  else:
    assert len(study.parts) == 1 + 2 * (3 + 2) + 1
    total = np.float32(sum(study.parts.values()))
    assert_close(total, logits[-1].max(), scale=9)


def test_random_tokens_are_repeated_after_the_prefix():
  task = Language(Characters('abcdefgh'), _FIELDS, None)
  task.prefix = (7, 7)
  (tokens,) = repeated_tokens(task, 5, seed=0)
  assert tokens[:2].tolist() == [7, 7]
  assert tokens[2:7].tolist() == tokens[7:].tolist()
  assert len({*tokens[2:7].tolist()}) == 5
  assert (repeated_tokens(task, 5, 0) == tokens).all()
  assert (repeated_tokens(task, 5, 1) != tokens).any()
  with pytest.raises(ValueError, match='expected 1 to 5, as they must fit'):
    repeated_tokens(task, 6, 0)
  small = Language(Characters('ab'), _FIELDS, None)
  assert repeated_tokens(small, 6, 0).max() < 2


def _table(printed):
  """Cells of the printed table by layer and head."""
  rows = _ROW.findall(printed)
  return {(int(i), int(j)): cells.split() for i, j, cells in rows}


def test_a_run_is_studied_in_texts(ended, tmp_path, capsys):
  texts = 'the lazy fox the', 'quick brownfxjmp'
  words = ['study', f'--workdir={ended}', f'--out={tmp_path}']
  assert cli.main([*words, *(f'--text={text}' for text in texts)]) == 0
  printed = capsys.readouterr().out
  table = _table(printed)
  assert [*table] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  task, params = trained.load(ended)
  scores = [task.study(params, task.encode('', x)).scores for x in texts]
  assert np.isnan(scores[1]).all((1, 2)).tolist() == [True] * 2 + [False] * 4
  expected = np.nanmean(scores, 0)
  for column, values in enumerate(expected):
    cells = {key: row[column] for key, row in table.items()}
    for key, cell in cells.items():
      assert abs(float(cell.rstrip('*')) - values[key]) < 6e-4
    (best,) = (key for key, cell in cells.items() if cell.endswith('*'))
    order = values.argmin() if column == 4 else values.argmax()
    assert best == np.unravel_index(order, values.shape)
  names = 'scores.png', 'attribution.png', 'attribution_2.png', 'study.html'
  assert printed.split()[-4:] == [str(tmp_path / name) for name in names]
  assert all((tmp_path / name).stat().st_size > 999 for name in names)
  page = (tmp_path / 'study.html').read_text()
  assert all(f'"label": "{text}"' in page for text in texts)

  assert cli.main([*words, f'--text={texts[1]}']) == 0
  printed = capsys.readouterr().out
  assert [row[:2] for row in _table(printed).values()] == [['–', '–']] * 4
  assert '–: no token occurs twice' in printed


def test_a_folder_is_studied_with_random_tokens(tmp_path, capsys, monkeypatch):
  vocabulary = Subwords.learn(['to be, or not to be'], 260)
  fields = dict(
    **_FIELDS,
    **_GEMMA | {'vocab_size': 270},
    positions='rotary',
    activation='geglu',
    with_feed_forward_bias=False,
    with_scaled_embeddings=True,
    attention=dict(with_bias=False, with_output_bias=False),
  )
  folder = tmp_path / 'gemma'
  transformers.save(folder, fields, _params(Language(None, fields, None)))
  (folder / 'tokenizer.json').write_text(vocabulary.json)
  monkeypatch.chdir(tmp_path)
  words = ['study', '--model=gemma', '--random_tokens=6', '--seed=3']
  assert cli.main(words) == 0
  printed = capsys.readouterr().out
  assert len(_table(printed)) == 6
  assert "no attribution.png: norm='both' normalises" in printed
  assert printed.split()[-2:] == ['plots/scores.png', 'plots/study.html']
  files = sorted(path.name for path in (tmp_path / 'plots').iterdir())
  assert files == ['scores.png', 'study.html']


def test_what_cannot_be_studied_is_refused_in_one_line(
  ended, config, tmp_path, capsys
):
  words = ['study', f'--workdir={ended}']
  for more, message in (
    (['--text=' + 'the lazy' * 3], 'text: expected at most 16 tokens'),
    (['--text=the', '--text=THE'], "text: symbols 'EHT' are not in the voc"),
    (['--text='], 'text: expected at least one symbol, got none'),
    (['--random_tokens=9'], 'random_tokens: expected 1 to 8, as they must fit'),
    (['--random_tokens=0'], 'random_tokens: expected 1 to 8'),
    ([], 'one of the arguments --text --random_tokens is required'),
    (['--text=a', '--random_tokens=2'], 'not allowed with argument --text'),
  ):
    try:
      status = cli.main([*words, *more])
    except SystemExit as error:
      status = error.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
  other = tmp_path / 'dates'
  run_files.write(other, config('dates'), {})
  assert cli.main(['study', f'--workdir={other}', '--text=a']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "expected a run of task 'language', got one of" in line
