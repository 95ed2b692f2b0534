"""Training steps: micro-batches are exact, non-finite steps change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention.ops import products
from attention.training.optimization import gradients, nonfinite, precision
from attention.training.optimization.step import Step
from attention.training.parallelism import sharding
from attention.training.training_config import TrainingConfig

_BASE = dict(steps=10, log_every=1, eval_every=1, checkpoint_every=1)


class _Regression:
  """Linear regression in which some examples are masked."""

  batch_size = 12

  def __init__(self, dtype=jnp.float32):
    self._dtype = dtype

  def init(self, rng):
    w = jax.random.normal(rng, (5, 3))
    return {'line': {'w': w, 'b': jnp.zeros(3)}}

  def loss(self, params, rng, batch):
    line = jax.tree.map(lambda x: x.astype(self._dtype), params['line'])
    y = batch['x'].astype(self._dtype) @ line['w'] + line['b'] * batch['poison']
    error = jnp.square(y.astype(jnp.float32) - batch['y']).sum(-1)
    return jnp.where(batch['mask'], error, 0).sum(), batch['mask'].sum()

  def batch(self, n, poison=1.0):
    chance = np.random.default_rng(n)
    return {
      'x': chance.normal(size=(12, 5)).astype('f'),
      'y': chance.normal(size=(12, 3)).astype('f'),
      'mask': np.arange(12) < 7,
      'poison': np.full((12, 1), poison, 'f'),
    }


def _step(mesh_of=1, task=None, **settings):
  task = task or _Regression()
  optimizer = optax.adam(0.1)
  mesh = sharding.make_mesh(mesh_of)
  return task, Step(
    task, optimizer, lambda n: n, 3, mesh, TrainingConfig(**_BASE, **settings)
  )


def _run(poisons, **settings):
  """Run one step per poison value; returns (state, [metrics])."""
  task, step = _step(**settings)
  state, measured = step.init(), []
  for n, poison in enumerate(poisons):
    batches = step.stack([task.batch(n, poison)])
    program = step.compile(batches).result()
    state, values = step.run(program, state, batches, n)
    measured.append({name: np.asarray(x)[0] for name, x in values.items()})
  return state, measured


def test_steps_of_one_call_match_steps_on_their_own():
  poisons = [1.0, 1.0, np.nan, 1.0]
  expected, alone = _run(poisons)
  task, step = _step(steps_per_call=3)
  batches = [task.batch(n, poison) for n, poison in enumerate(poisons)]
  state, measured = step.init(), []
  for first, count in ((0, 1), (1, 3)):
    stacked = step.stack(batches[first : first + count])
    program = step.compile(stacked).result()
    state, values = step.run(program, state, stacked, first, count)
    rows = jax.tree.map(np.asarray, values)
    measured += [{k: x[i] for k, x in rows.items()} for i in range(count)]
  near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(near, state, expected)
  jax.tree.map(near, measured, alone)
  assert len(step._programs) == 1


def test_steps_of_one_call_are_traced_once(monkeypatch):
  task, traces = _Regression(), []
  loss = task.loss
  monkeypatch.setattr(task, 'loss', lambda *x: traces.append(1) or loss(*x))
  _, step = _step(task=task, steps_per_call=3)
  step.lower(step.stack([task.batch(0)]))
  assert len(traces) == 1


@pytest.mark.parametrize('parts', [2, 3, 6])
def test_microbatches_match_the_whole_batch(parts, assert_close):
  whole, measured = _run([1.0] * 4)
  state, again = _run([1.0] * 4, num_microbatches=parts)
  for one, two in zip(measured, again, strict=True):
    assert_close(two['train/loss'], one['train/loss'])
    assert_close(two['train/grad_norm'], one['train/grad_norm'])
  jax.tree.map(assert_close, state['params'], whole['params'])


def test_a_fully_masked_batch_has_zero_loss_and_gradients():
  task, step = _step()
  batch = task.batch(0) | {'mask': np.zeros(12, bool)}
  batches = step.stack([batch])
  program = step.compile(batches).result()
  state, values = step.run(program, step.init(), batches, 0)
  assert values['train/loss'] == values['train/grad_norm'] == 0
  assert np.isfinite(state['params']['line']['w']).all()


def test_bad_steps_change_nothing_and_are_counted():
  clean, _ = _run([1.0])
  state, measured = _run([1.0, np.nan, np.inf])
  for part in ('params', 'optimizer'):
    jax.tree.map(np.testing.assert_array_equal, state[part], clean[part])
  assert [int(m['train/bad_steps']) for m in measured] == [0, 1, 2]
  assert nonfinite.BadSteps(*measured[-1]['bad'].tolist()) == (2, 2, 2, 0)
  _, measured = _run([np.nan, 1.0, 1.0, np.nan])
  assert [m['bad'][1] for m in measured] == [1, 0, 0, 1]
  assert nonfinite.BadSteps(*measured[-1]['bad'].tolist()) == (2, 1, 4, 0)
  assert np.isfinite(measured[2]['train/loss'])
  # The optimizer's schedule goes on from its last update.
  assert [m['train/learning_rate'] for m in measured] == [1, 1, 2, 3]


def test_only_float32_steps_on_cpus_have_options(monkeypatch):
  _, step = _step()
  kind = step.mesh.devices.flat[0].platform
  options = precision.compiler_options('', kind)
  assert bool(options) == (kind == 'cpu')
  assert not precision.compiler_options('products=bfloat16', kind)
  known, _ = _run([1.0])
  monkeypatch.setattr(
    precision, 'compiler_options', lambda *_: {'xla_no_such_option': 'x'}
  )
  unknown, _ = _run([1.0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), known, unknown
  )


def test_frozen_parameters_have_no_gradients_and_no_moments(assert_close):
  task = _Regression()
  task.is_trained = lambda module, name, value: name == 'b'
  state, measured = _run([1.0, np.nan, 1.0], task=task)
  _, step = _step()
  first = step.init()['params']['line']
  np.testing.assert_array_equal(state['params']['line']['w'], first['w'])
  assert (state['params']['line']['b'] != first['b']).all()
  assert state['optimizer'][0].mu.keys() == {'line'}
  assert state['optimizer'][0].mu['line'].keys() == {'b'}
  assert [int(m['train/bad_steps']) for m in measured] == [0, 1, 1]
  params, batch = {'line': first}, task.batch(0)
  loss, grads = jax.jit(gradients.make(task, step.mesh))(params, None, batch)
  exact = jax.grad(lambda p: task.loss(p, None, batch)[0] / 7)(params)
  assert_close(grads['line'].pop('b'), exact['line']['b'])
  assert grads == {'line': {}}
  assert_close(loss, measured[0]['train/loss'])
  assert_close(
    measured[0]['train/grad_norm'], optax.tree.norm(exact['line']['b'])
  )


def test_a_frozen_matrix_takes_no_memory_for_its_gradient():
  size = 512

  class Task:
    def __init__(self, is_trained):
      self.is_trained = is_trained

    def loss(self, params, rng, batch):
      y = (batch['x'] @ params['line']['w']) * params['line']['scale']
      return jnp.square(y).sum(), jnp.float32(1)

  shapes = {'w': (size, size), 'scale': (size,)}
  params = {'line': {k: jnp.zeros(shape) for k, shape in shapes.items()}}
  batch, held = {'x': jnp.zeros((2, size))}, []
  for is_trained in (None, lambda module, name, value: name == 'scale'):
    compute = gradients.make(Task(is_trained), sharding.make_mesh(1), 2)
    memory = (
      jax.jit(compute)
      .lower(params, jax.random.key(0), batch)
      .compile()
      .memory_analysis()
    )
    held.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
  assert held[0] > 4 * size**2 > 16 * held[1]


def test_the_watch_warns_and_then_raises_with_the_parameter_name():
  warnings = []
  params = {'gpt/line': {'b': 0, 'w': 0}}
  watch = nonfinite.Watch(params, 3, warnings.append)
  watch.note(np.array([[0, 0, 0, -1]]))
  watch.note(np.array([[1, 1, 7, 1]]))
  assert not warnings
  watch.note(np.array([[2, 2, 7, 1]]))
  assert warnings == [
    'warning: the gradient of gpt/line/w is not finite at step 7; step skipped '
    '(1 in a row, 1 in total)'
  ]
  watch.note(np.array([[3, 3, 7, 1]]))
  again = nonfinite.Watch(params, 3, warnings.append)
  rows = np.array([[1, 1, 7, 1], [2, 2, 7, 1], [3, 3, 7, 1]])
  again.note(rows, 2)
  again.flush()
  assert len(warnings) == 4
  with pytest.raises(
    nonfinite.NotFinite,
    match='of gpt/line/w has not been finite for 3 .* starting at step 7;',
  ):
    watch.flush()


def test_the_loss_scale_decreases_until_gradients_fit_float16(assert_close):
  policy = 'params=float32,compute=float16,output=float32'
  task = _Regression(jnp.float16)
  state, scaled = _run([30.0] * 12, task=task, precision=policy)
  good = [np.isfinite(m['train/grad_norm']) for m in scaled]
  first = good.index(True)
  assert first > 0
  assert 1 <= state['guard']['scale'] == 2.0 ** (15 - good.count(False))
  # Steps that overflow because of the scale do not count as bad.
  assert not state['guard']['bad'][0]
  # Skipped steps changed nothing, so the gradient is that of the initial state.
  exact = _Regression()
  params = exact.init(jax.random.key(3))
  batch = exact.batch(first, 30.0)
  grads = jax.grad(lambda p: exact.loss(p, None, batch)[0] / 7)(params)
  assert_close(
    scaled[first]['train/grad_norm'], optax.tree.norm(grads), 'float16'
  )
  # A non-finite loss is a bad step at any scale.
  _, scaled = _run([np.nan] * 3, task=task, precision=policy)
  assert [m['bad'][0] for m in scaled] == [1, 2, 3]


@pytest.mark.parametrize(
  'text',
  [
    'float33',
    'params=float32,compute=int7',
    '=',
    'products=float16',
    'products',
    'params=float32,products=',
  ],
)
def test_invalid_precisions_raise(text):
  with pytest.raises(ValueError, match='training.precision: expected a policy'):
    precision.parse(text)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize(
  'text', ['products=bfloat16,{}', '{},products=bfloat16']
)
def test_products_and_a_compute_dtype_together_raise(text, dtype):
  with pytest.raises(ValueError, match='either compute or products'):
    precision.parse(text.format(f'params=float32,compute={dtype}'))


@pytest.mark.parametrize(
  ('text', 'has_policy'),
  [
    ('products=bfloat16', False),
    ('params=float32,products=bfloat16', True),
    ('products=bf16,compute=float32', True),
  ],
)
def test_products_round_in_the_context_only(text, has_policy, arrays):
  assert (precision.parse(text).policy is not None) == has_policy
  x, w = arrays((2, 3), (3, 5))
  exact = products.dot(x, w)
  with precision.applied(text):
    assert (products.dot(x, w) != exact).any()
    with precision.applied(''):
      np.testing.assert_array_equal(products.dot(x, w), exact)
  np.testing.assert_array_equal(products.dot(x, w), exact)
