"""Commands on folders of transformers, in place of runs."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

import attention.__main__ as cli
from attention import models
from attention.data import language
from attention.data.subwords import Subwords
from attention.interop import transformers
from attention.training import transformers_folder
from attention.training.tasks.language import Language

_TEXT = 'to be, or not to be: that is the question. ' * 9


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A folder with a small Llama, random but far from where it starts."""
  folder = tmp_path_factory.mktemp('made') / 'llama'
  vocabulary = Subwords.learn([_TEXT], 270)
  fields = dict(
    vocab_size=280,
    context_size=32,
    num_layers=2,
    num_heads=2,
    model_size=12,
    positions='rotary',
    norm_kind='rms',
    activation='swiglu',
    with_feed_forward_bias=False,
    attention=dict(with_bias=False, with_output_bias=False),
  )
  shapes = jax.eval_shape(Language(None, fields, None).init, jax.random.key(0))
  rng = np.random.RandomState(0)
  params = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype('f') / x.shape[0] ** 0.5,
    shapes,
  )
  transformers.save(folder, fields, params)
  (folder / 'tokenizer.json').write_text(vocabulary.json)
  return folder


@pytest.fixture
def folder(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'llama')


def test_a_folder_is_sampled_from_and_drawn(folder, capsys, tmp_path):
  words = ['sample', f'--model={folder}', '--prompt=to be', '--num_tokens=20']
  assert cli.main([*words, '--temperature=0']) == 0
  text = capsys.readouterr().out
  assert text.startswith('to be')
  # The folder is its own draft.
  assert cli.main([*words, '--temperature=0', f'--draft={folder}']) == 0
  out, err = capsys.readouterr()
  assert out == text
  assert 'accepted per call' in err
  out = tmp_path / 'out'
  words = ['plot', f'--model={folder}', '--text=to be', f'--out={out}']
  assert cli.main(words) == 0
  assert (out / 'attention.html').exists()
  assert cli.main(['inspect', f'--model={folder}']) == 0
  count = sum(x.size for x in jax.tree.leaves(transformers.load(folder)[1]))
  assert f'{count:,}' in capsys.readouterr().out


def test_a_text_is_evaluated_with_a_sliding_context(folder, tmp_path, capsys):
  task, params = transformers_folder.load_task(folder)
  found = task.evaluate_text(params, _TEXT, context_size=16)
  tokens = task.encode('text', _TEXT)[0]
  total = 0.0
  # Each target after the tokens of its window, one by one.
  stride = (16 + 1) // 2
  scored = 1
  for start in range(0, len(tokens), stride):
    window = tokens[start : start + 17]
    logits = np.asarray(task.apply(params, window[None, :-1])[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(max(1, scored - start), len(window)):
      total -= log_probs[i - 1, window[i]]
      scored += 1
    if scored == len(tokens):
      break
  assert found['tokens'] == len(tokens) - 1
  assert abs(found['loss'] - total / (len(tokens) - 1)) < 1e-4
  size = len(_TEXT) - len(task.vocabulary.decode(tokens[:1]))
  assert found['bytes'] == size
  assert abs(found['bits_per_byte'] - total / math.log(2) / size) < 1e-4
  path = tmp_path / 'text.txt'
  path.write_text(_TEXT)
  words = ['evaluate', f'--model={folder}', f'--text={path}']
  assert cli.main([*words, '--context_size=16', '--dtype=float32']) == 0
  assert f'{found["loss"]:.4f} nats per token' in capsys.readouterr().out


@pytest.mark.parametrize('num_prefix', [0, 2])
@pytest.mark.parametrize('count', [3, 9, 10, 31])
def test_sliding_windows_score_each_target_once(num_prefix, count):
  tokens = np.concatenate([[90, 91][:num_prefix], np.arange(count)])
  context, seen = 8, []
  for batch in language.sliding_batches(tokens, context, 3, num_prefix):
    for row, targets, mask in zip(*batch.values(), strict=True):
      assert row.shape == targets.shape == mask.shape == (context,)
      np.testing.assert_array_equal(row[1:], targets[:-1])
      for i in np.flatnonzero(mask):
        seen.append(targets[i])
        # What it follows: the prefix, and half a context or all there is.
        assert row[:num_prefix].tolist() == [90, 91][:num_prefix]
        before = row[num_prefix : i + 1]
        np.testing.assert_array_equal(
          before, np.arange(targets[i] - len(before), targets[i])
        )
        assert len(before) >= min(targets[i], (context + 1 - num_prefix) // 2)
  assert sorted(seen) == list(range(0 if num_prefix else 1, count))


def test_texts_start_with_the_tokens_of_the_tokenizer(folder):
  path = folder / 'tokenizer.json'
  tokenizer = json.loads(path.read_text())
  for number, name in ((270, '<s>'), (280, '<image>')):  # of ids up to 279
    tokenizer['added_tokens'].append(
      dict(
        id=number,
        content=name,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
      )
    )
  tokenizer['post_processor'] = {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': '<s>', 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [
      {'Sequence': {'id': 'A', 'type_id': 0}},
      {'Sequence': {'id': 'B', 'type_id': 0}},
    ],
    'special_tokens': {'<s>': {'id': '<s>', 'ids': [270], 'tokens': ['<s>']}},
  }
  path.write_text(json.dumps(tokenizer))
  (folder / 'generation_config.json').write_text('{"eos_token_id": [3, 5]}')
  task, params = transformers_folder.load_task(folder)
  assert task.prefix == (270,)
  assert task.vocabulary.size == 271
  assert task.end == (3, 5)
  tokens = task.encode('text', 'to be')[0]
  assert tokens[0] == 270
  assert task.vocabulary.decode(tokens[1:]) == 'to be'
  found = task.evaluate_text(params, _TEXT)
  assert found['bytes'] == len(_TEXT)
  text = task.sample(params, 'to be', 4, seed=0, temperature=0.0)
  assert text.startswith('to be')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda f: (f / 'config.json').unlink(), 'found no config.json'),
    (lambda f: (f / 'model.safetensors').unlink(), 'got none; convert'),
    (lambda f: (f / 'tokenizer.json').unlink(), 'expected tokenizer.json'),
    (lambda f: (f / 'tokenizer.json').write_text('{}'), 'not a tokenizer'),
    (
      lambda f: (f / 'tokenizer.json').write_text(
        Subwords.learn([str(list(range(999)))], 300).json
      ),
      'expected at most 280 tokens',
    ),
  ],
)
def test_incomplete_folders_are_refused_in_one_line(
  folder, change, message, capsys
):
  change(folder)
  assert cli.main(['sample', f'--model={folder}']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_flags_of_runs_and_folders_do_not_mix(folder, capsys):
  for words, message in (
    (['sample'], 'one of the arguments --workdir --model is required'),
    (['evaluate', f'--model={folder}'], '--model: requires --text=FILE'),
    (
      ['sample', f'--model={folder}', '--workdir=x'],
      'not allowed with argument',
    ),
  ):
    try:
      status = cli.main(words)
    except SystemExit as error:
      status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_fields_are_those_of_models_create(folder):
  fields, params = transformers.load(folder)
  kind = fields.pop('model')
  assert kind == 'gpt'
  assert models.resolve(kind, fields)
  assert 'gpt/tokens' in params
