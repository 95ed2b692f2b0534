"""Reports on a run: FLOPs, memory, TensorBoard, traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.ops.mapping import map_rows
from attention.training import command_line, loop, tasks
from attention.training.parallelism import sharding
from attention.training.reporting import flops, memory
from attention.training.reporting.tensorboard import TensorBoard
from attention.training.workdir import metrics


class _Layers:
  """A model with three matrix products, two of them in a scan."""

  def init(self, rng):
    return {'first': jnp.zeros((5, 7)), 'rest': jnp.zeros((2, 7, 7))}

  def loss(self, params, rng, batch):
    x, _ = jax.lax.scan(
      lambda x, w: (jax.checkpoint(jnp.dot)(x, w), None),
      batch['x'] @ params['first'],
      params['rest'],
    )
    return x.sum(), 1


def test_a_step_counts_three_times_its_forward_products():
  batch = {'x': np.zeros((11, 5), 'f')}
  forward = 2 * 11 * 5 * 7 + 2 * (2 * 11 * 7 * 7)
  assert flops.count_step(_Layers(), batch) == 3 * forward


@pytest.mark.parametrize(
  'implementation', [{}, {'model.implementation': 'reference'}]
)
def test_flops_of_a_gpt_match_the_formula(config, implementation):
  task = tasks.create(config(**implementation))
  m, layers, t, v = 16, 2, 16, task.vocabulary.size
  per_token = layers * (12 * m * m + 2 * t * m) + m * v
  tokens = task.tokens_per_step
  assert flops.count_step(task, task.batch(0)) == 6 * per_token * tokens


@pytest.mark.parametrize('rows', [6, 2**12 + 3])
def test_layers_computed_a_few_rows_at_a_time_are_counted_whole(rows):
  class Rows:
    def init(self, rng):
      return jnp.ones((4, 8))

    def loss(self, params, rng, batch):
      def function(w, x):
        y = x @ w  # 2 · 4 · 8 FLOPs per position
        # Products with 5 keys and 5 values of 8 channels.
        return attention.dot_product_attention(y, y, y)

      return jax.vmap(
        lambda x: map_rows(function, params, x[..., None, :]).sum()
      )(batch)

  batch = jnp.ones((3, rows, 5, 4))
  forward = 3 * rows * 5 * (2 * 4 * 8 + 2 * 5 * (8 + 8))
  assert flops.count_step(Rows(), batch) == 3 * forward


def test_utilisation_is_none_if_the_peak_is_unknown():
  mesh = sharding.make_mesh(1)
  assert flops.utilisation(1e12, mesh) is None
  assert memory.peak_mib(mesh) is None or memory.peak_mib(mesh) > 0


def test_a_run_writes_tensorboard_events_and_a_trace(config, tmp_path, capsys):
  pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  settings = config(
    **{
      'training.steps': 4,
      'training.log_every': 2,
      'training.tensorboard': True,
    }
  )
  loop.prepare(settings, tmp_path / 'run', profile=(0, 3))()
  (path,) = (tmp_path / 'run' / 'tb').iterdir()
  steps = {}
  for event in _events(path.read_bytes(), event_pb2.Event):
    for value in event.summary.value:
      steps.setdefault(value.tag, []).append(event.step)
  for name in ('train/loss', 'train/flops_per_second'):
    assert steps[name] == [2, 4]
  assert steps['eval/loss'] == [4]
  assert steps['loss'] == [4]  # the image of the loss curve
  assert any('sample' in tag for tag in steps)
  traces = list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1
  line = metrics.read(tmp_path / 'run' / 'metrics.jsonl')[-2]
  assert line['train/seconds_per_step'] > 0
  settings.training.steps = 5
  loop.prepare(settings, tmp_path / 'run', profile=(0, 3))()
  assert '--profile: nothing to trace, as step 3 was' in capsys.readouterr().out


def _events(content, kind):
  """Parse an event file; records are length, checksum, content, checksum."""
  while content:
    size = int.from_bytes(content[:8], 'little')
    yield kind.FromString(content[12 : 12 + size])
    content = content[16 + size :]


def test_without_tensorboardx_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tensorboardX', None)
  board = TensorBoard(tmp_path / 'tb', 0)
  board.scalars(1, {'a': 1.0})
  board.sample(1, 'text')
  board.pictures(1, tmp_path)
  board.close()
  assert not (tmp_path / 'tb').exists()


def test_every_key_of_training_can_be_set_on_the_command_line(tmp_path):
  parsed = command_line.parse(
    [
      'train.py',
      '--config=configs/gpt_char.py:debug',
      '--workdir=x',
      '--config.training.deterministic=True',
      '--config.training.mesh.fsdp=2',
      '--config.training.max_bad_steps=7',
      '--profile=3:5',
    ]
  )
  training = parsed.config.training
  assert training.deterministic is True
  mesh = {'data': -1, 'fsdp': 2, 'tensor': 1, 'context': 1, 'pairs': 1}
  assert training.mesh.to_dict() == mesh
  assert training.max_bad_steps == 7
  assert parsed.profile == (3, 5)
