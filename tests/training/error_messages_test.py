"""Usage errors: one line, exit status 2, before anything is compiled."""

import json
import shutil
import time

import jax
import pytest

import attention.__main__ as cli
from attention.training import loop
from attention.training import main as training_main

_CONFIG = 'configs/gpt_char.py:debug'
# name: (arguments after --config=…, expected message); {tmp} is a folder.
_MISTAKES = {
  'unknown_key': (
    ['--config.model.num_layer=4'],
    '--config.model.num_layer: no such key; did you mean '
    '--config.model.num_layers?',
  ),
  'no_key_near': (['--config.model.colour=2'], 'model.colour: no such key\n'),
  'no_dashes': (
    ['config.model.num_layers=4'],
    'config.model.num_layers=4: unexpected argument; did you mean '
    '--config.model.num_layers=4?',
  ),
  'leftover': (['again'], 'again: unexpected argument'),
  'no_value': (['--config.model.num_layers'], 'expected --config.model.num_'),
  'wrong_type': (
    ['--config.model.num_layers=four'],
    "--config.model.num_layers: expected an integer, got 'four'",
  ),
  'no_number': (['--config.optimizer.b1=x'], "b1: expected a number, got 'x'"),
  'no_truth': (
    ['--config.training.deterministic=maybe'],
    "--config.training.deterministic: expected true or false, got 'maybe'",
  ),
  'no_group': (
    ['--config.data=foo'],
    '--config.data: expected individual keys, such as --config.data.',
  ),
  'no_id': (['--process_id=a'], "--process_id: expected an integer, got 'a'"),
  'unknown_flag': (['--workdri=x'], "Unknown command line flag 'workdri'"),
  'no_data': (['--config.data.path={tmp}/no.txt'], 'no.txt: No such file'),
  'data_folder': (['--config.data.path={tmp}'], 'Is a directory'),
  'empty_data': (['--config.data.path={tmp}/empty'], 'empty: the file is empt'),
  'not_utf8': (['--config.data.path={tmp}/latin'], 'not UTF-8 at byte 1 (0xe9'),
  'short': (['--config.data.path={tmp}/short'], 'too few for context_size=16'),
  'heads': (
    ['--config.model.num_heads=3'],
    'num_heads: expected a divisor of model_size=16, got 3',
  ),
  'steps': (['--config.training.steps=0'], 'training.steps: expected 1 or mor'),
  'rate': (['--config.optimizer.learning_rate=-1'], 'optimizer.learning_rate'),
  'task': (['--config.task=langauge'], "task: expected one of ['"),
  'batch_parts': (
    ['--config.training.num_microbatches=3'],
    'training.num_microbatches: expected a divisor of the batch of 4, got 3',
  ),
  'precision': (
    ['--config.training.precision=params=float33'],
    'training.precision: expected a policy such as',
  ),
  'unknown_products': (
    ['--config.training.precision=products=float16'],
    "(products: expected bfloat16, got 'float16')",
  ),
  'products_and_compute': (
    ['--config.training.precision=compute=bfloat16,products=bfloat16'],
    'training.precision: expected either compute or products, because',
  ),
  'no_axis': (
    ['--config.training.mesh.fdsp=2'],
    'training.mesh.fdsp: no such key; did you mean '
    '--config.training.mesh.fsdp?',
  ),
  'mesh': (
    ['--config.training.mesh.tensor=99'],
    '× 99 × 1 × 1; set --config.training.cpu_devices=99 for more virtual '
    'devices',
  ),
  'no_devices': (
    ['--config.training.mesh.data=0'],
    'training.mesh.data: expected 1 or more, or -1 for all remaining devices',
  ),
  'bad_steps': (['--config.training.max_bad_steps=0'], 'expected 1 or more'),
  'level': (['--config.data.level=words'], 'level: expected'),
  'few_subwords': (
    ['--config.data.level=bpe', '--config.data.vocab_size=99'],
    'data.vocab_size: expected 256 or more, got 99',
  ),
  'no_tokenizer': (['--config.data.level={tmp}/no.json'], 'no.json: No such f'),
  'broken_tokenizer': (
    ['--config.data.level={tmp}/broken.json'],
    'broken.json: not a tokenizer.json: ',
  ),
  'lossy_tokenizer': (
    ['--config.data.level={tmp}/lossy.json', f'--config.data.path={__file__}'],
    "at character 0 decodes to '[UNK]'",
  ),
  'small_model': (
    ['--config.model.vocab_size=9'],
    'model.vocab_size: expected at least ',
  ),
  'profile': (['--profile=5'], '--profile: expected START:STOP'),
  'late_profile': (['--profile=500:501'], '--profile: expected START below'),
  'processes': (['--num_processes=2'], 'expected all three or none'),
  'clip': (['--config.optimizer.clip_norm=0'], 'optimizer.clip_norm: expect'),
  'layers': (
    ['--config.model.num_layers=0'],
    'num_layers: expected 1 or more, got 0',
  ),
  'no_layers': (['--config.model.num_layers=-1'], 'num_layers: expected 1'),
  'width': (['--config.model.model_size=0'], 'model.model_size: expected 1 or'),
  'low_precision': (
    ['--config.training.precision=bf16'],
    'training.precision: expected params=float32',
  ),
  'memory': (
    ['--config.model.model_size=4194304', '--config.model.num_layers=1'],
    'model: expected parameters and optimizer state of at most ',
  ),
  'seed': (['--config.seed=-1'], 'seed: expected 0 to 4294967295, got -1'),
  'large_seed': (['--config.seed=99999999999'], 'seed: expected 0 to'),
  'b1': (['--config.optimizer.b1=2'], 'optimizer.b1: expected in [0, 1), got'),
  'b2': (['--config.optimizer.b2=1'], 'optimizer.b2: expected in [0, 1), got'),
  'cpu_devices': (
    ['--config.training.cpu_devices=0'],
    'training.cpu_devices: expected 1 or more, got 0',
  ),
  'workdir_file': (['--workdir={tmp}/short'], 'expected a folder, got a file'),
}


# A tokenizer that maps every word to [UNK].
_LOSSY = """{
  "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
  "normalizer": null, "pre_tokenizer": null, "post_processor": null,
  "decoder": null,
  "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
}"""


@pytest.fixture
def run(tmp_path, monkeypatch, text, capsys):
  """run(*words) -> (exit status, text on standard error)."""
  (tmp_path / 'empty').write_bytes(b'')
  (tmp_path / 'latin').write_bytes('déjà vu'.encode('latin-1') * 100)
  (tmp_path / 'short').write_text('abc')
  (tmp_path / 'broken.json').write_text('{}')
  (tmp_path / 'lossy.json').write_text(_LOSSY)

  def compiled(*_):
    raise AssertionError('got as far as running')

  monkeypatch.setattr(loop, '_Run', compiled)
  monkeypatch.setattr(training_main, 'set_up_jax', lambda *_: None)

  def run(*words):
    before = jax.config.jax_compilation_cache_dir
    words = [word.format(tmp=tmp_path) for word in words]
    status = training_main.main(['train.py', *words])
    assert jax.config.jax_compilation_cache_dir == before
    return status, capsys.readouterr().err

  return run


def _assert_one_line(result, message):
  status, error = result
  assert status == 2
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert message in error


@pytest.mark.parametrize('name', _MISTAKES)
def test_usage_errors_are_one_line(name, run, tmp_path):
  words, message = _MISTAKES[name]
  common = [f'--config={_CONFIG}', '--workdir={tmp}/run']
  clock = time.process_time()
  _assert_one_line(run(*common, *words), message)
  assert time.process_time() - clock < 2
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('word', ['--help', '-h'])
def test_help_names_all_flags(word, capsys):
  assert training_main.main(['train.py', word]) == 0
  output = capsys.readouterr().out
  for name in ('config', *training_main.command_line.Arguments._fields):
    assert f'--{name}=' in output


def test_errors_name_invalid_config_files(run, tmp_path):
  (tmp_path / 'other.py').write_text('x = 1\n')
  (tmp_path / 'raises.py').write_text('def get_config(): return oops\n')
  for words, message in (
    (['--config={tmp}/no.py', '--workdir=x'], 'no.py: No such file'),
    (['--config={tmp}/empty', '--workdir=x'], 'empty: the file is empty'),
    (['--config={tmp}/latin', '--workdir=x'], 'latin: not UTF-8 at byte 1'),
    (
      ['--config={tmp}/other.py', '--workdir=x'],
      'expected a function get_conf',
    ),
    (['--config={tmp}/raises.py', '--workdir=x'], 'oops'),
    (['--config=configs/gpt_char.py:big', '--workdir=x'], "got 'big'"),
    (['--workdir=x'], '--config: expected one config file, got 0'),
    ([f'--config={_CONFIG}'], '--workdir: expected a folder'),
  ):
    _assert_one_line(run(*words), message)


def test_a_workdir_of_another_run_shows_the_difference(config, run, tmp_path):
  settings = config(**{'training.steps': 1})
  loop.run_files.write(tmp_path / 'run', settings, {'sha256': '0' * 64})
  (tmp_path / 'run' / 'checkpoints' / '1').mkdir(parents=True)
  common = [
    f'--config={_CONFIG}',
    '--workdir={tmp}/run',
    f'--config.data.path={settings.data.path}',
  ]
  result = run(*common, '--config.model.num_layers=3', '--config.seed=1')
  _assert_one_line(result, '(model.num_layers 2 → 3, seed 0 → 1)')
  # steps and log_every differ as well, which is allowed.
  _assert_one_line(run(*common), 'on other data (sha256 00000000… → ')


def test_a_workdir_without_a_checkpoint_accepts_another_config(
  config, text, run, tmp_path
):
  settings = config(**{'training.steps': 1})
  loop.run_files.write(tmp_path / 'run', settings, {'sha256': '0' * 64})
  common = [f'--config={_CONFIG}', '--workdir={tmp}/run']
  common += [f'--config.data.path={text}', '--config.seed=1']
  with pytest.raises(AssertionError, match='got as far as running'):
    run(*common)
  with loop.lock.held(tmp_path / 'run'):
    _assert_one_line(run(*common), 'is running here')
  note = loop.run_files.check(tmp_path / 'run', config(seed=1), {})
  assert 'no checkpoint of its previous config; starting afresh' in note


@pytest.mark.parametrize('workdir', ['text.txt/run', 'sys/run'])
def test_a_workdir_that_cannot_be_created_is_named(
  workdir, config, tmp_path, text, train_here, capsys
):
  (tmp_path / 'text.txt').write_text('')
  (tmp_path / 'sys').symlink_to('/proc')
  words = [f'--config={_CONFIG}', f'--workdir={tmp_path / workdir}']
  assert train_here(*words, f'--config.data.path={text}') == 2
  error = capsys.readouterr().err
  assert 'error: --workdir: expected a folder that can be written to' in error
  assert error.count('\n') == 1


def test_a_damaged_line_of_metrics_is_named(
  config, ended, tmp_path, train_here, text, capsys
):
  shutil.copytree(ended, tmp_path / 'run')
  path = tmp_path / 'run' / 'metrics.jsonl'
  first, *others = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([first, 'gar\n', *others]))
  words = [f'--config={_CONFIG}', f'--workdir={tmp_path / "run"}']
  words += ['--config.training.steps=4', f'--config.data.path={text}']
  assert train_here(*words, '--config.training.tensorboard=False') == 2
  error = capsys.readouterr().err
  assert 'metrics.jsonl:2: expected an object of JSON with a step' in error
  assert error.count('\n') == 1


def test_a_config_that_does_not_fit_its_checkpoint_is_named(
  ended, tmp_path, capsys
):
  shutil.copytree(ended, tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  record = json.loads(path.read_text())
  record['model']['num_layers'] += 1
  path.write_text(json.dumps(record))
  assert cli.main(['sample', f'--workdir={tmp_path / "run"}']) == 2
  error = capsys.readouterr().err
  assert 'config.json does not fit checkpoint 3 (' in error
  assert error.count('\n') == 1 and len(error) < 500


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('seed', 'zero', "seed: expected 0 to 4294967295, got 'zero'"),
    ('model.num_layers', 4.5, 'num_layers: expected 1 or more, got 4.5'),
    ('task', None, 'task: expected one of .*, got None'),
  ],
)
def test_values_of_wrong_types_in_own_configs_are_named(
  config, tmp_path, key, value, message
):
  settings = config().unlock()
  with settings.ignore_type():
    settings.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    loop.prepare(settings, tmp_path / 'run')


def test_a_workdir_is_checked_again_under_its_lock(config, tmp_path):
  settings = {'training.steps': 1}
  run = loop.prepare(config(**settings, seed=7), tmp_path / 'run')
  loop.train(config(**settings), tmp_path / 'run')
  with pytest.raises(loop.Unusable, match='seed 0 → 7'):
    run()


def test_errors_name_a_damaged_config(config, run, tmp_path, capsys):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{bad')
  data = f'--config.data.path={config().data.path}'
  workdir = '--workdir={tmp}/run'
  result = run(f'--config={_CONFIG}', workdir, data)
  _assert_one_line(result, 'run/config.json: not JSON: ')
  status = cli.main(['sample', f'--workdir={tmp_path}/run'])
  _assert_one_line((status, capsys.readouterr().err), 'config.json: not JSON: ')
