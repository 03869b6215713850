"""Tree memory = tokens memory = a full forward of every node's whole text.

A small network over eleven tokens, of which two end a step and one a solution,
so that trees hold cut-off steps, finished solutions and equal candidates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.candidates import sampled_priors
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.sample import DecodedRows, make_controls
from o1jax.search import NO_PARENT, ROOT, make_strategy, run_on_device
from o1jax.search.contracts import Request
from o1jax.step_model import make_step_model
from o1jax.step_shape import StepShape
from o1jax.types import ProblemBatch
from policies import drawn_anew

pytestmark = pytest.mark.usefixtures("quick_programs")

VOCAB, PAD, EOS, STOPS = 11, 0, 1, (2, 3)
B, A, P, S, DEPTH, M = 3, 3, 5, 4, 3, 2
TEMPERATURE, TOP_P, ROLLOUT_WEIGHT = 0.8, 0.9, 0.4
NUM_SIMULATIONS, CAPACITY = 26, 1 + 10 * A
NETWORK = make_network(
  TransformerConfig(
    vocab_size=VOCAB,
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    ffn_width=16,
    value_hidden_width=8,
    # Reads the positions of what it gathered, not only its masks.
    sliding_window=(5, None),
  )
)
PROBLEMS = ProblemBatch(
  tokens=np.random.default_rng(3).integers(4, VOCAB, (B, P)).astype(np.int32),
  lengths=np.array([5, 2, 4], np.int32),
  seeds=np.array([11, 12, 13], np.uint32),
)


@functools.cache
def params():
  params = NETWORK.init(jax.random.key(1))
  # Ends of steps are common, and candidates differ in their values.
  kernel = params["policy_head"]["kernel"]
  params["policy_head"]["kernel"] = 2 * kernel
  return params | {"value_head": drawn_anew(params["value_head"])}


def step_model(**changed):
  """Fields of the shape and options of the model alike may be changed."""
  shape = dict(max_step_tokens=S, max_depth=DEPTH, stop_ids=STOPS)
  shape = {n: changed.pop(n, value) for n, value in shape.items()}
  options = dict(
    num_candidates=A,
    eos_id=EOS,
    pad_id=PAD,
    controls=make_controls(temperature=TEMPERATURE, top_p=TOP_P),
    num_rollouts=M,
  )
  return make_step_model(NETWORK, StepShape(**shape), **options | changed)


@functools.cache
def search_fn(memory, num_parallel_leaves):
  strategy = make_strategy(
    "mcts",
    step_model(memory=memory),
    num_simulations=NUM_SIMULATIONS,
    capacity=CAPACITY,
    num_parallel_leaves=num_parallel_leaves,
    rollout_weight=ROLLOUT_WEIGHT,
  )
  return run_on_device(strategy)


@functools.cache
def searched(memory="tree", num_parallel_leaves=2):
  search = search_fn(memory, num_parallel_leaves)
  return search(params(), jax.random.key(5), PROBLEMS)


class Text(NamedTuple):
  """A node of a tree with its whole text, prompt included."""

  row: int
  node: int
  tokens: list[int]
  start: int


def slots(state, row):
  """Nodes that an expansion wrote, valid or merged."""
  return range(1, int(state.tree.next_free[row]))


def texts_of(state):
  """Every node below the roots, in plain Python."""
  store = jax.tree.map(np.asarray, state.node_state.replace(prompt=None))
  found = []
  for row in range(store.tokens.shape[0]):
    prompt = store.prompt_tokens[row, : store.prompt_lengths[row]].tolist()
    whole = {ROOT: prompt}
    for node in slots(state, row):
      before = whole[int(state.tree.parent[row, node])]
      step = store.tokens[row, node, : store.lengths[row, node]].tolist()
      whole[node] = before + step
      found.append(Text(row, node, whole[node], len(before)))
  return found


@jax.jit
def full_forward(params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, _ = NETWORK.apply(params, tokens, positions)
  return NETWORK.policy_logits(params, hidden), NETWORK.value(params, hidden)


def read_texts(texts, rows):
  """Logits `[rows, T, V]` and values `[rows, T]` of fresh full forwards."""
  tokens = np.full((rows, P + DEPTH * S), PAD, np.int32)
  for i, text in enumerate(texts):
    tokens[i, : len(text)] = text
  logits, values = full_forward(params(), tokens)
  return np.asarray(logits, np.float64), np.asarray(values)


@functools.cache
def oracle():
  """Texts of the tree memory, and what a full forward says about each."""
  texts = texts_of(searched())
  rows = B * (CAPACITY - 1)
  return texts, *read_texts([t.tokens for t in texts], rows)


def log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def drawn_from(logits):
  """Probabilities after temperature and top-p, by sorting in plain NumPy."""
  probs = np.exp(log_softmax(logits / TEMPERATURE))
  kept = np.zeros_like(probs)
  order = np.argsort(-probs, kind="stable")
  total = 0.0
  for token in order:
    kept[token] = probs[token]
    total += probs[token]
    if total >= TOP_P:
      break
  return kept / kept.sum()


def step_logits(text, logits):
  """Logits each token of the node's step was drawn from, `[tokens, V]`."""
  return logits[text.start - 1 : len(text.tokens) - 1]


def visits_by_text(state):
  """Visits of every valid node, by problem and whole text."""
  return {
    (text.row, *text.tokens): int(state.tree.num_visits[text.row, text.node])
    for text in texts_of(state)
    if state.tree.is_valid[text.row, text.node]
  }


TREE_FIELDS = (
  "parent",
  "depth",
  "first_child",
  "num_visits",
  "mean_value",
  "value",
  "reward",
  "prior_logits",
  "is_terminal",
  "is_valid",
  "next_free",
)
STORE_FIELDS = (
  "tokens",
  "lengths",
  "parent",
  "depth",
  "end_positions",
  "is_finished",
  "behavior_log_probs",
  "policy_log_probs",
  "rollout_tokens",
)


def assert_same_trees(one, other):
  """Node for node; floats within 1e-5, everything else exactly."""

  def compare(name, left, right):
    left, right = np.asarray(left), np.asarray(right)
    if np.issubdtype(left.dtype, np.floating):
      np.testing.assert_allclose(left, right, atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(left, right, err_msg=name)

  for name in TREE_FIELDS:
    compare(name, getattr(one.tree, name), getattr(other.tree, name))
  for name in STORE_FIELDS:
    # Behind the nodes lie the spare slots, which hold waste.
    left, right = (
      getattr(state.node_state, name)[:, :CAPACITY] for state in (one, other)
    )
    compare(name, left, right)


@pytest.mark.parametrize(
  "num_parallel_leaves", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_tree_memory_is_tokens_memory_node_for_node(num_parallel_leaves):
  tree = searched("tree", num_parallel_leaves)
  tokens = searched("tokens", num_parallel_leaves)
  assert_same_trees(tree, tokens)
  assert tokens.node_state.keys == () and tokens.node_state.prompt is None
  # What is compared has branches of every kind.
  used = np.arange(CAPACITY)[None] < np.asarray(tree.tree.next_free)[:, None]
  store, depth = tree.node_state, np.asarray(tree.tree.depth)
  assert depth.max() == DEPTH
  assert (used & ~np.asarray(tree.tree.is_valid)).any()
  is_finished = np.asarray(store.is_finished)[:, :CAPACITY]
  is_cut = used & np.asarray(tree.tree.is_terminal) & ~is_finished
  assert (is_cut & (depth < DEPTH)).any() and is_finished.any()
  assert (np.asarray(store.rollout_tokens) != PAD).any()
  if num_parallel_leaves == 1:
    # Looking ahead changes neither candidates nor visits.
    visits = visits_by_text(tree)
    ahead = visits_by_text(searched("tree", 2))
    assert visits == {text: ahead[text] for text in visits}


def test_tokens_are_the_inverse_cdf_of_a_full_forward():
  """Also shows that no draw sits within 1e-5 of a threshold."""
  state = searched()
  texts, logits, _ = oracle()
  key_data = jax.random.key_data(state.tree_keys)

  @jax.jit
  def uniforms(key_data, path_id):
    tree_key = jax.random.wrap_key_data(key_data)
    step_key, _ = jax.random.split(jax.random.fold_in(tree_key, path_id))
    keys = jax.random.split(step_key, A)
    return jax.vmap(lambda key: jax.random.uniform(key, (S,)))(keys)

  closest = 1.0
  for i, text in enumerate(texts):
    parent = int(state.tree.parent[text.row, text.node])
    first = int(state.tree.first_child[text.row, parent])
    path_id = state.path_ids[text.row, parent]
    drawn = np.asarray(uniforms(key_data[text.row], path_id))
    step = text.tokens[text.start :]
    for u, token, at in zip(
      drawn[text.node - first, : len(step)],
      step,
      step_logits(text, logits[i]),
      strict=True,
    ):
      reached = np.cumsum(drawn_from(at))
      below = reached[token - 1] if token else 0.0
      assert below <= u < reached[token]
      closest = min(closest, u - below, reached[token] - u)
  assert closest > 1e-5


def test_log_probs_in_the_store_are_those_of_a_full_forward():
  store = searched().node_state
  texts, logits, _ = oracle()
  some_cut = 0
  for i, text in enumerate(texts):
    at = step_logits(text, logits[i])
    step = np.array(text.tokens[text.start :])
    index = np.arange(len(step))
    policy = log_softmax(at)[index, step]
    shaped = np.array([drawn_from(row) for row in at])
    some_cut += (shaped == 0).any()
    for name, expected in (
      ("policy_log_probs", policy),
      ("behavior_log_probs", np.log(shaped[index, step])),
    ):
      found = np.asarray(getattr(store, name)[text.row, text.node])
      np.testing.assert_allclose(found[: len(step)], expected, atol=1e-5)
      np.testing.assert_array_equal(found[len(step) :], 0)
  assert some_cut


def test_steps_end_where_they_should():
  state, store = searched(), searched().node_state
  for text in oracle()[0]:
    step = text.tokens[text.start :]
    ends = [t for t in step if t in (*STOPS, EOS)]
    assert ends in ([], [step[-1]])
    is_open = bool(ends) and ends != [EOS]
    depth = int(store.depth[text.row, text.node])
    assert is_open or len(step) == S or ends == [EOS]
    assert bool(store.is_finished[text.row, text.node]) == (ends == [EOS])
    if bool(state.tree.is_valid[text.row, text.node]):
      is_terminal = not is_open or depth == DEPTH
      assert bool(state.tree.is_terminal[text.row, text.node]) == is_terminal
    assert int(store.end_positions[text.row, text.node]) == len(text.tokens)


def rollout_ends(state, text):
  """Whole texts of a node's rollouts, and which of them ended."""
  for tokens in np.asarray(
    state.node_state.rollout_tokens[text.row, text.node]
  ):
    tokens = tokens.tolist()
    has_ended = EOS in tokens
    length = tokens.index(EOS) + 1 if has_ended else len(tokens)
    assert set(tokens[length:]) <= {PAD}
    yield text.tokens + tokens[:length], has_ended


def test_values_are_those_of_a_full_forward_at_the_last_token():
  state = searched()
  texts, _, values = oracle()
  rolled = [list(rollout_ends(state, text)) for text in texts]
  capacity = B * (CAPACITY - 1)
  ends = []
  for m in range(M):
    whole = [rollouts[m][0][: P + DEPTH * S] for rollouts in rolled]
    ends.append(read_texts(whole, capacity)[1])
  checked = 0
  for i, text in enumerate(texts):
    at = (text.row, text.node)
    if not state.tree.is_valid[at]:
      continue
    own = values[i, len(text.tokens) - 1]
    if state.tree.is_terminal[at]:
      expected = own if state.node_state.is_finished[at] else 0.0
      np.testing.assert_allclose(state.tree.reward[at], expected, atol=1e-5)
      assert float(state.tree.value[at]) == 0
      continue
    outcomes = [
      ends[m][i, len(whole) - 1] if has_ended else 0.0
      for m, (whole, has_ended) in enumerate(rolled[i])
    ]
    expected = (1 - ROLLOUT_WEIGHT) * own + ROLLOUT_WEIGHT * np.mean(outcomes)
    np.testing.assert_allclose(state.tree.value[at], expected, atol=1e-5)
    checked += any(outcomes)
  # The values differ from node to node, or equality would show nothing.
  assert checked and np.std(values) > 0.05
  roots = [PROBLEMS.tokens[row, : PROBLEMS.lengths[row]] for row in range(B)]
  root_values = read_texts(roots, capacity)[1]
  found = state.tree.value[:, ROOT]
  np.testing.assert_allclose(
    found, root_values[np.arange(B), PROBLEMS.lengths - 1], atol=1e-5
  )


def test_equal_candidates_are_merged_and_priors_corrected():
  state = searched()
  texts, logits, _ = oracle()
  siblings = {}
  for i, text in enumerate(texts):
    parent = int(state.tree.parent[text.row, text.node])
    siblings.setdefault((text.row, parent), []).append((i, text))
  merged = 0
  for group in siblings.values():
    seen = {}
    for i, text in group:
      step = tuple(text.tokens[text.start :])
      at = step_logits(text, logits[i])
      index = np.arange(len(step))
      policy = np.exp(log_softmax(at)[index, step].sum())
      behavior = np.prod(
        [drawn_from(r)[t] for r, t in zip(at, step, strict=True)]
      )
      assert bool(state.tree.is_valid[text.row, text.node]) == (
        step not in seen
      )
      first = seen.setdefault(step, [text, 0, policy / behavior])
      first[1] += 1
    merged += len(seen) < A
    weights = {t.node: n / A * ratio for t, n, ratio in seen.values()}
    for text, *_ in seen.values():
      expected = weights[text.node] / sum(weights.values())
      found = np.exp(state.tree.prior_logits[text.row, text.node])
      np.testing.assert_allclose(found, expected, atol=1e-5)
  assert merged


@pytest.mark.parametrize("memory", ["tree", "tokens"])
def test_costs_are_the_tokens_of_the_tree(memory):
  state = searched(memory)
  store = state.node_state
  for row in range(B):
    texts = [text for text in texts_of(state) if text.row == row]
    generated = sum(len(text.tokens) - text.start for text in texts)
    for text in texts:
      is_open = not (
        bool(store.is_finished[row, text.node])
        or text.tokens[-1] not in STOPS
        or int(store.depth[row, text.node]) == DEPTH
      )
      # A candidate that was merged into its equal has no rollouts of its own.
      if is_open and state.tree.is_valid[row, text.node]:
        whole = [tokens for tokens, _ in rollout_ends(state, text)]
        generated += sum(map(len, whole)) - M * len(text.tokens)
    forward = int(PROBLEMS.lengths[row]) + generated
    if memory == "tokens":
      starts = {int(state.tree.parent[row, t.node]): t.start for t in texts}
      forward += sum(starts.values())
    assert int(state.cost.generated_tokens[row]) == generated
    assert int(state.cost.forward_tokens[row]) == forward


def rows_of(batch, rows):
  """Some trees of a batch, or some problems."""
  return jax.tree.map(lambda x: x[np.array(rows)], batch)


@pytest.mark.parametrize(
  "num_copies", [B, pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_problem_is_searched_as_if_it_were_alone(num_copies):
  # Copies of one problem take the program that is compiled already.
  whole = searched()
  for row in range(B):
    problems = rows_of(PROBLEMS, [row] * num_copies)
    alone = search_fn("tree", 2)(params(), jax.random.key(5), problems)
    for copy in range(num_copies):
      assert_same_trees(rows_of(whole, [row]), rows_of(alone, [copy]))
    assert int(alone.tree.parent[0, ROOT]) == NO_PARENT


def expand_roots(**changed):
  """One expansion of every root, without a search."""
  model = step_model(**changed)

  @jax.jit
  def run(params, keys, problems):
    _, _, store = model.root_fn(params, problems, 1 + A)
    root = jnp.zeros((B, 1), jnp.int32)
    first_child = jnp.ones((B, 1), jnp.int32)
    is_active = jnp.array([[True], [False], [True]])
    first_child = jnp.where(is_active, first_child, 1 + A)
    request = Request(
      node=root,
      first_child=first_child,
      num_rows=jnp.where(is_active, A, 0),
      siblings=jnp.zeros((B, 1, 0), jnp.int32),
    )
    return store, *model.step_fn(params, keys, request, store)

  keys = jax.random.split(jax.random.key(2), (B, 1))
  return run(params(), keys, PROBLEMS)


def test_endless_steps_are_terminal_with_outcome_0():
  # Tokens that this network cannot draw.
  before, expansion, after = expand_roots(
    stop_ids=(VOCAB,), eos_id=VOCAB + 1, num_rollouts=0
  )
  active = np.array([True, False, True])
  np.testing.assert_array_equal(after.lengths[active, 1 : 1 + A], S)
  assert np.all(np.asarray(expansion.is_terminal)[active])
  np.testing.assert_array_equal(np.asarray(expansion.outcome)[active], 0)
  assert np.all(np.asarray(expansion.value)[active] > 0)
  assert not np.any(after.is_finished)
  # The tree that was not active pays nothing and keeps its nodes.
  np.testing.assert_array_equal(expansion.generated_tokens, [A * S, 0, A * S])
  np.testing.assert_array_equal(expansion.forward_tokens, [A * S, 0, A * S])
  for name in (*STORE_FIELDS, "last_hidden"):
    old, new = (getattr(store, name)[1, : 1 + A] for store in (before, after))
    np.testing.assert_array_equal(old, new)


# One block after another, all in one call, and several in each of some calls.
WIDENED = {
  "mcts": (
    "mcts",
    2,
    dict(num_simulations=40, capacity=1 + 2 * 24, max_blocks=4),
    4,
  ),
  "treebon": ("treebon", 2, dict(num_roots=10, max_depth=2), 5),
  "chains": (
    "speculative_rejection",
    1,
    dict(num_rows=4, num_starts=12, capacity=40),
    12,
  ),
}


@pytest.mark.parametrize(
  "case", ["mcts", "chains", pytest.param("treebon", marks=pytest.mark.slow)]
)
def test_a_widened_node_merges_and_weighs_over_all_its_draws(case):
  """Each distinct step once, with prior (draws) * p / q over all draws."""
  name, num_candidates, options, most_blocks = WIDENED[case]
  model = step_model(num_candidates=num_candidates, num_rollouts=0)
  strategy = make_strategy(name, model, **options)
  state = run_on_device(strategy)(params(), jax.random.key(6), PROBLEMS)
  tree, store = jax.tree.map(
    np.asarray, (state.tree, state.node_state.replace(prompt=None))
  )
  assert np.max(tree.num_blocks) == most_blocks
  num_merged = 0
  for row in range(B):
    for node in np.flatnonzero(tree.num_blocks[row] > 0):
      drawn = np.flatnonzero(tree.parent[row] == node)
      weights, first = {}, {}
      for child in drawn:
        step = tuple(store.tokens[row, child, : store.lengths[row, child]])
        ratio = np.sum(
          store.policy_log_probs[row, child]
          - store.behavior_log_probs[row, child]
        )
        weights[step] = weights.get(step, 0.0) + np.exp(ratio)
        first.setdefault(step, child)
      valid = drawn[tree.is_valid[row, drawn]]
      assert valid.tolist() == list(first.values())
      num_merged += len(drawn) - len(valid)
      expected = np.array([weights[step] for step in first])
      np.testing.assert_allclose(
        np.exp(tree.prior_logits[row, valid]),
        expected / expected.sum(),
        atol=2e-5,
      )
  assert num_merged > 3


@functools.cache
def guided(name):
  """A search without rollouts whose scores are one guidance's."""
  strategy = make_strategy(
    "mcts",
    step_model(num_rollouts=0, guidance={name: 1.0}),
    num_simulations=8,
    capacity=1 + 4 * A,
  )
  return run_on_device(strategy)(params(), jax.random.key(6), PROBLEMS)


@pytest.mark.parametrize(
  "name",
  [
    "confidence",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("certainty", "mean_prob", "log_prob")
    ),
  ],
)
def test_guidance_is_that_of_a_full_forward_over_the_text(name):
  state = guided(name)
  texts = texts_of(state)
  logits, _ = read_texts([text.tokens for text in texts], B * (CAPACITY - 1))
  for i, text in enumerate(texts):
    if text.tokens[-1] not in (*STOPS, EOS):
      continue  # It was cut off.
    start = int(PROBLEMS.lengths[text.row])
    log_probs = log_softmax(logits[i, start - 1 : len(text.tokens) - 1])
    chosen = log_probs[np.arange(len(log_probs)), text.tokens[start:]]
    best = np.sort(np.exp(log_probs), axis=-1)[:, -5:].sum(-1)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    expected = {
      "confidence": np.mean(np.exp(chosen) / best),
      "certainty": np.exp(-np.mean(entropy)),
      "mean_prob": np.exp(np.mean(chosen)),
      "log_prob": np.sum(chosen),
    }[name]
    tree = state.tree
    score = tree.value[text.row, text.node] + tree.reward[text.row, text.node]
    if int(state.node_state.depth[text.row, text.node]) == DEPTH and (
      text.tokens[-1] != EOS
    ):
      continue  # The last step, and no answer.
    np.testing.assert_allclose(score, expected, atol=1e-4)


def test_votes_keep_every_candidate():
  tokens = np.array([[[4, 2, 0], [4, 2, 0], [5, 1, 0], [0, 0, 0]]], np.int32)
  logs = np.log(np.array([[[0.5], [0.5], [0.2], [1.0]]], np.float32))
  rows = DecodedRows(
    tokens=tokens,
    lengths=np.array([[2, 2, 2, 0]], np.int32),
    behavior_log_probs=logs,
    policy_log_probs=2 * logs,
    **dict.fromkeys(
      ("last_hidden", "ended", "stopped", "keys", "values"), None
    ),
  )
  is_valid, priors = sampled_priors(rows, merge_duplicates=False)
  np.testing.assert_array_equal(is_valid, [[True, True, True, False]])
  exact = dict(atol=2e-5)
  np.testing.assert_allclose(np.exp(priors[:, :3]), [[0.5, 0.5, 0.2]], **exact)
  is_valid, priors = sampled_priors(rows, merge_duplicates=True)
  np.testing.assert_array_equal(is_valid, [[True, False, True, False]])
  np.testing.assert_allclose(np.exp(priors[0, [0, 2]]), [1.0, 0.2], **exact)


def test_last_bits_do_not_break_ties_of_priors():
  logs = np.full((1, 3, 1), -1.3, np.float32)
  other = logs + np.float32([[[0.0], [1e-6], [-1e-6]]])
  rows = DecodedRows(
    tokens=np.arange(3, dtype=np.int32).reshape(1, 3, 1),
    lengths=np.ones((1, 3), np.int32),
    behavior_log_probs=logs,
    policy_log_probs=other,
    **dict.fromkeys(
      ("last_hidden", "ended", "stopped", "keys", "values"), None
    ),
  )
  _, priors = sampled_priors(rows, merge_duplicates=True)
  np.testing.assert_array_equal(priors, 0)


@pytest.mark.parametrize(
  "changed, words",
  [
    ({"memory": "trie"}, "memory='trie': choose one of"),
    ({"num_candidates": 0}, "num_candidates=0 must be at least 1"),
    ({"max_depth": 0}, "max_depth=0"),
    ({"max_step_tokens": 0}, "max_step_tokens=0"),
    ({"max_depth": 1}, "num_rollouts needs max_depth of 2 or more"),
  ],
)
def test_bad_sizes_are_refused(changed, words):
  with pytest.raises(ValueError, match=words):
    step_model(**changed)


def token_model(num_candidates, guidance, depth):
  """Steps of a token, the A likeliest ones."""
  return make_step_model(
    NETWORK,
    StepShape(
      max_step_tokens=1,
      max_depth=depth,
      goes_on_where_cut=True,
      enumerates=True,
    ),
    num_candidates=num_candidates,
    eos_id=EOS,
    pad_id=PAD,
    controls=make_controls(),
    guidance=guidance,
  )


def token_tree(num_candidates, guidance=None, depth=3):
  """Every path of that many tokens, the A likeliest at each place."""
  model = token_model(num_candidates, guidance, depth)
  nodes = sum(num_candidates**level for level in range(depth))
  return make_strategy(
    "mcts",
    model,
    num_simulations=400,
    rule="uct",
    capacity=1 + num_candidates * nodes,
  )


@pytest.mark.parametrize(
  "name",
  ["confidence", pytest.param("certainty", marks=pytest.mark.slow)],
)
def test_enumerated_tokens_count_for_guidance(name):
  search = run_on_device(token_tree(2, {name: 1.0}, depth=2))
  tree = search(params(), jax.random.key(6), PROBLEMS).tree
  values = np.asarray(tree.value + tree.reward)[:, 1:3]
  assert np.all((values > 0) & (values < 1))
  if name == "confidence":
    # The likelier token first.
    assert np.all(values[:, 0] > values[:, 1])


def test_tokens_are_enumerated_in_order_of_their_probability():
  state = run_on_device(token_tree(3))(params(), jax.random.key(6), PROBLEMS)
  texts = texts_of(state)
  logits, values = read_texts([text.tokens for text in texts], B * 40)
  tree, seen = state.tree, {}
  for i, text in enumerate(texts):
    at = text.start - 1
    seen.setdefault((text.row, *text.tokens[: text.start]), []).append(text)
    order = np.argsort(-logits[i, at], kind="stable")[:3]
    place = len(seen[text.row, *text.tokens[: text.start]]) - 1
    assert text.tokens[-1] == order[place]
    probs = np.exp(log_softmax(logits[i, at]))[order]
    prior = np.exp(float(tree.prior_logits[text.row, text.node]))
    assert prior == pytest.approx(probs[place] / probs.sum(), abs=2e-5)
    is_end = text.tokens[-1] == EOS
    length = len(text.tokens) - int(PROBLEMS.lengths[text.row])
    assert bool(tree.is_solution[text.row, text.node]) == is_end
    assert bool(tree.is_terminal[text.row, text.node]) == (
      is_end or length == 3
    )
    score = float((tree.value + tree.reward)[text.row, text.node])
    expected = values[i, len(text.tokens) - 1]
    is_open = is_end or length < 3
    assert score == pytest.approx(expected if is_open else 0.0, abs=1e-5)
  # All that there is: 3 + 9 + 27 nodes, less those below an end.
  assert all(len(found) == 3 for found in seen.values())


def test_a_beam_over_tokens_by_likelihood_is_brute_force():
  """Every token of the vocabulary behind each of the four likeliest texts."""
  width, depth = 4, 3
  model = token_model(VOCAB, {"log_prob": 1.0}, depth)
  strategy = make_strategy("beam", model, width=width, max_depth=depth)
  state = run_on_device(strategy)(params(), jax.random.key(6), PROBLEMS)
  chosen = np.asarray(strategy.select(state))
  texts = {(text.row, *text.tokens): text for text in texts_of(state)}
  num_made = 0
  for row in range(B):
    prompt = PROBLEMS.tokens[row, : PROBLEMS.lengths[row]].tolist()
    beam, finished = {tuple(prompt): 0.0}, {}
    for _ in range(depth):
      logits, _ = read_texts(list(beam), width)
      made = {}
      for i, (text, score) in enumerate(beam.items()):
        log_probs = log_softmax(logits[i, len(text) - 1])
        made |= {(*text, t): score + log_probs[t] for t in range(VOCAB)}
      finished |= {text: made.pop(text) for text in [*made] if text[-1] == EOS}
      num_made += len(made)
      best = sorted(made, key=made.get, reverse=True)[:width]
      beam = {text: made[text] for text in best}
      assert all((row, *text) in texts for text in made)
    best = max(finished, key=finished.get)
    assert texts[row, *best].node == chosen[row]
    score = float(state.tree.reward[row, chosen[row]])
    assert score == pytest.approx(finished[best], abs=1e-4)
    num_made += len(finished)
  assert num_made == len(texts) == B * VOCAB * (1 + width * (depth - 1))


OPENING = (4, 5)
ANSWER_TOKENS = 5


@functools.cache
def revised(memory):
  """Two revisions behind each first answer, in two chains of one problem."""
  model = make_step_model(
    NETWORK,
    StepShape(max_step_tokens=ANSWER_TOKENS, max_depth=3, opening=OPENING),
    num_candidates=1,
    eos_id=EOS,
    pad_id=PAD,
    controls=make_controls(temperature=TEMPERATURE),
    memory=memory,
    merge_duplicates=False,
  )
  strategy = make_strategy("revision", model, num_revisions=2, num_chains=4)
  return run_on_device(strategy)(params(), jax.random.key(8), PROBLEMS)


# The tokens memory revises in test_battery.py too.
@pytest.mark.parametrize(
  "memory", ["tree", pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_a_revision_is_read_behind_its_answer_without_the_end_mark(memory):
  state = revised(memory)
  store = jax.tree.map(np.asarray, state.node_state.replace(prompt=None))
  found = []
  for row in range(B):
    prompt = store.prompt_tokens[row, : store.prompt_lengths[row]].tolist()
    context = {ROOT: prompt}
    for node in slots(state, row):
      parent = int(state.tree.parent[row, node])
      before = context[parent]
      step = store.tokens[row, node, : store.lengths[row, node]].tolist()
      given = 0 if parent == ROOT else len(OPENING)
      assert tuple(step[:given]) == OPENING[:given]
      ended = step[-1] == EOS
      assert bool(state.tree.is_solution[row, node]) == ended
      is_last = int(state.tree.depth[row, node]) == 3
      assert bool(state.tree.is_terminal[row, node]) == (is_last or not ended)
      context[node] = before + (step[:-1] if ended else step)
      found.append((row, node, before + step, len(before), given))
  assert max(len(text) - start for *_, text, start, _ in found) > 0
  assert {given for *_, given in found} == {0, len(OPENING)}
  rows = 40
  tokens = np.full((rows, P + 3 * ANSWER_TOKENS), PAD, np.int32)
  for i, (_, _, text, _, _) in enumerate(found):
    tokens[i, : len(text)] = text
  logits, values = full_forward(params(), tokens)
  for i, (row, node, text, start, given) in enumerate(found):
    log_probs = log_softmax(np.asarray(logits[i], np.float64))
    at = np.arange(start + given, len(text))
    expected = log_probs[at - 1, np.array(text)[at]]
    count = len(text) - start
    written = store.policy_log_probs[row, node, :count]
    np.testing.assert_array_equal(written[:given], 0)
    np.testing.assert_allclose(written[given:], expected, atol=1e-5)
    if text[-1] == EOS:
      score = float((state.tree.value + state.tree.reward)[row, node])
      assert score == pytest.approx(float(values[i, len(text) - 1]), abs=1e-5)


@pytest.mark.slow
def test_both_memories_revise_alike():
  whole, again = revised("tree"), revised("tokens")
  for name in ("tokens", "lengths", "is_finished"):
    np.testing.assert_array_equal(
      getattr(whole.node_state, name), getattr(again.node_state, name)
    )
  np.testing.assert_allclose(
    whole.tree.value + whole.tree.reward,
    again.tree.value + again.tree.reward,
    atol=1e-5,
  )
