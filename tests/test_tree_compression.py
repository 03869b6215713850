"""A tree in int8 or behind a window = a full forward of its texts, nearly or
exactly.

One chain of expansions a problem, with text up to three steps behind the
prompt. The oracle reads each text whole, with plain numbers and a mask that two
loops draw.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import policies
from o1jax import mesh as mesh_lib
from o1jax import node_store
from o1jax.node_store import CacheOptions
from o1jax.policy import attention
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.quantize import Quantized, quantize
from o1jax.policy.sample import make_controls
from o1jax.search.contracts import Request
from o1jax.solver import Solver
from o1jax.step_model import make_step_model
from o1jax.step_shape import StepShape
from o1jax.types import ProblemBatch

pytestmark = pytest.mark.usefixtures("quick_programs")

VOCAB, PAD, EOS = 11, 0, 12  # an end that is never drawn
B, A, P, S, DEPTH = 2, 3, 6, 4, 4
LONGEST = P + S * DEPTH
BOUND = 0.02  # of int8, as its docstring says
CONFIG = TransformerConfig(
  vocab_size=VOCAB,
  num_layers=2,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  ffn_width=16,
)
NETWORK = make_network(CONFIG)
PROBLEMS = ProblemBatch(
  tokens=np.random.default_rng(3).integers(1, VOCAB, (B, P)).astype(np.int32),
  lengths=np.array([6, 3], np.int32),
  seeds=np.array([11, 12], np.uint32),
)


@functools.cache
def params():
  return NETWORK.init(jax.random.key(1))


def model(memory="tree", network=NETWORK, **cache):
  return make_step_model(
    network,
    StepShape(max_step_tokens=S, max_depth=DEPTH, goes_on_where_cut=True),
    num_candidates=A,
    eos_id=EOS,
    pad_id=PAD,
    controls=make_controls(),
    memory=memory,
    cache=CacheOptions(**cache),
  )


def grown(**options):
  """The store after DEPTH expansions, each of the first candidate before."""
  one = model(**options)
  step = jax.jit(one.step_fn)
  root = jax.jit(one.root_fn, static_argnums=2)
  _, _, store = root(params(), PROBLEMS, 1 + A * DEPTH)
  for level in range(DEPTH):
    request = Request(
      node=jnp.full((B, 1), max(0, 1 + A * (level - 1)), jnp.int32),
      first_child=jnp.full((B, 1), 1 + A * level, jnp.int32),
      num_rows=jnp.full((B, 1), A, jnp.int32),
      siblings=jnp.zeros((B, 1, 0), jnp.int32),
    )
    keys = jax.random.split(jax.random.key(level), (B, 1))
    _, store = step(params(), keys, request, store)
  return store


whole = functools.cache(grown)


@jax.jit
def full_log_probs(params, tokens):
  positions = jnp.broadcast_to(jnp.arange(LONGEST)[None], tokens.shape)
  hidden, _ = NETWORK.apply(params, tokens, positions)
  return jax.nn.log_softmax(NETWORK.policy_logits(params, hidden))


def texts_of(store):
  """Row, node, whole text, and where the node's own step begins."""
  tokens, parent = np.asarray(store.tokens), np.asarray(store.parent)
  found = []
  for row in range(B):
    prompt = PROBLEMS.tokens[row, : PROBLEMS.lengths[row]].tolist()
    texts = {0: prompt}
    for node in range(1, 1 + A * DEPTH):
      before = texts[int(parent[row, node])]
      texts[node] = before + tokens[row, node].tolist()
      found.append((row, node, texts[node], len(before)))
  assert max(start for *_, start in found) == P + S * (DEPTH - 1)
  return found


def changes(store):
  """How far each log-prob of a store is from that of its text read whole."""
  found = texts_of(store)
  rows = np.full((len(found), LONGEST), PAD, np.int32)
  for i, (_, _, text, _) in enumerate(found):
    rows[i, : len(text)] = text
  log_probs = np.asarray(full_log_probs(params(), rows))
  off = []
  for i, (row, node, text, start) in enumerate(found):
    at = np.arange(start, len(text))
    want = log_probs[i, at - 1, rows[i, at]]
    off.append(np.asarray(store.policy_log_probs)[row, node] - want)
  return np.abs(off)


@pytest.fixture
def draw_mask(monkeypatch):
  """Makes the oracle read through a window with sinks."""

  def draw(window, num_sinks):
    mask = np.zeros((1, LONGEST, LONGEST), bool)
    for reader in range(LONGEST):
      for read in range(reader + 1):
        mask[0, reader, read] = reader - read < window or read < num_sinks
    monkeypatch.setattr(attention, "causal_mask", lambda *_: jnp.asarray(mask))
    full_log_probs.clear_cache()

  yield draw
  full_log_probs.clear_cache()


def test_int8_moves_log_probs_within_the_bound():
  store = grown(dtype="int8")
  assert {k.values.dtype.name for k in (*store.keys, *store.values)} == {"int8"}
  off = changes(store)
  assert 1e-4 < off.max() < BOUND
  # The first steps stand behind the prompt alone, which is in int8 as well.
  assert off[:A].max() > 1e-5


def test_the_bound_notices_a_wrong_scale(monkeypatch):
  def too_large(*args):
    exact = quantize(*args)
    return exact.replace(scales=1.1 * exact.scales)

  monkeypatch.setattr(node_store, "quantize", too_large)
  assert changes(grown(dtype="int8")).max() > 1.5 * BOUND


def test_int8_keeps_a_quarter_and_the_scales():
  def size(store):
    arrays = store.keys, store.values
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))

  def root(name):
    root_fn = functools.partial(model(dtype=name).root_fn, capacity=5)
    return jax.eval_shape(root_fn, params(), PROBLEMS)[2]

  roots = [root(name) for name in ("network", "int8")]
  slots, heads = S * CONFIG.head_width, CONFIG.num_kv_heads
  assert size(roots[1]) / size(roots[0]) == (slots + 4) / (4 * slots)
  assert roots[1].keys[0].scales.shape == (B, 5 + A, heads, 1)
  assert isinstance(roots[1].prompt.keys[0], Quantized)


def test_a_window_that_holds_the_text_changes_nothing():
  store = grown(window=LONGEST, num_sinks=1)
  assert changes(whole()).max() < 1e-5
  np.testing.assert_array_equal(store.tokens, whole().tokens)
  np.testing.assert_allclose(
    store.policy_log_probs, whole().policy_log_probs, atol=1e-5
  )


@pytest.mark.parametrize("memory", ["tree", "tokens"])
def test_a_window_is_the_mask_that_it_stands_for(memory, draw_mask):
  store = grown(memory=memory, window=5, num_sinks=2)
  assert changes(store).max() > 0.02  # without a window
  draw_mask(5, 2)
  assert changes(store).max() < 1e-5


def test_int8_and_a_window_go_together(draw_mask):
  store = grown(dtype="int8", window=5, num_sinks=2)
  # 6 slots of the prompt are all that a token can read, in one block of 16.
  assert store.prompt.mask.shape == (B, 16)
  draw_mask(5, 2)
  assert 1e-5 < changes(store).max() < BOUND


def solver(**cache):
  return Solver(
    policies.tiny_policy(),
    strategy="best_of_n",
    batch_size=B,
    mesh=mesh_lib.make_mesh({"data": 1}),
    task=policies.countdown(),
    cache=cache,
  )


def test_the_fields_of_a_solver_reach_the_tree():
  init = solver(dtype="int8", window=4, num_sinks=1).strategy.init
  arguments = policies.tiny_params(), jax.random.key(0), PROBLEMS
  store = jax.eval_shape(init, *arguments).node_state
  assert store.keys[0].values.dtype == jnp.int8
  # Sinks and window are 4 of the 6 slots: one block.
  assert store.prompt.mask.shape == (B, 16)
  with pytest.raises(ValueError, match="did you mean 'dtype'"):
    solver(dtyp="int8")
  with pytest.raises(ValueError, match="is 2.5: it takes int"):
    solver(window=2.5)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"dtype": "int4"}, "cache_dtype='int4' is not one of network, int8"),
    ({"window": 0}, "window=0 must be 1 or more, or None"),
    ({"window": 4, "num_sinks": -1}, "num_sinks=-1 must be 0 or more"),
    ({"num_sinks": 2}, "num_sinks=2 without a window: set window"),
    ({"dtype": "int8", "memory": "tokens"}, "keeps no keys and values"),
  ],
)
def test_what_does_not_go_together_is_refused(options, words):
  with pytest.raises(ValueError, match=words):
    model(**options)


def test_a_policy_with_windows_of_its_own_keeps_them():
  config = TransformerConfig(**{**vars(CONFIG), "sliding_window": (5, None)})
  with pytest.raises(ValueError, match="windows of its own"):
    model(network=make_network(config), window=8)
