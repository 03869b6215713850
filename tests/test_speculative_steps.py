"""Candidates drawn with a draft = candidates drawn token by token: the same
where the likeliest token is taken, of the same distribution elsewhere.

Everything is asked of the second expansion of a tree, whose context is a prompt
with a step behind it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import policies
from o1jax import mesh as mesh_lib
from o1jax.policy.config import TransformerConfig
from o1jax.policy.drafts import ModelDraft, NgramDraft
from o1jax.policy.network import make_network
from o1jax.policy.sample import make_controls
from o1jax.search.contracts import Request
from o1jax.solver import Solver
from o1jax.step_model import make_step_model
from o1jax.step_shape import StepShape
from o1jax.types import ProblemBatch

pytestmark = pytest.mark.usefixtures("quick_programs")

VOCAB, PAD, EOS, STOP = 6, 0, 1, 2
B, S, K, MANY = 2, 4, 2, 4096
CONFIG = TransformerConfig(
  vocab_size=VOCAB,
  num_layers=1,
  width=8,
  num_heads=2,
  num_kv_heads=1,
  head_width=4,
  ffn_width=8,
)
NETWORK = make_network(CONFIG)
PROBLEMS = ProblemBatch(
  tokens=np.array([[3, 4, 5, 3, 4], [5, 5, 4, 0, 0]], np.int32),
  lengths=np.array([5, 3], np.int32),
  seeds=np.array([11, 12], np.uint32),
)
STEPS = StepShape(max_step_tokens=S, max_depth=3, stop_ids=(STOP,))
REVISIONS = StepShape(max_step_tokens=S + 2, max_depth=3, opening=(4, STOP))
GREEDY = make_controls(temperature=0.0)


@functools.cache
def params(seed=6):
  """Clear preferences, and ends that do not come at once."""
  found = jax.tree.map(lambda x: x * 1.5, NETWORK.init(jax.random.key(seed)))
  kernel = found["policy_head"]["kernel"]
  found["policy_head"]["kernel"] = kernel.at[:, 1:3].multiply(0.6)
  return found


def make_draft(name):
  if name == "ngram":
    return NgramDraft(2)
  return ModelDraft(params(6 if name == "perfect" else 0), NETWORK)


def expanded(num_proposals=K, draft="ngram", shape=STEPS, **options):
  """Store and expansion after the root and its first child were expanded."""
  options = dict(num_candidates=3, controls=GREEDY) | options
  num_candidates = options["num_candidates"]
  model = make_step_model(
    NETWORK,
    shape,
    eos_id=EOS,
    pad_id=PAD,
    merge_duplicates=False,
    num_proposals=num_proposals,
    draft=make_draft(draft),
    **options,
  )

  @jax.jit
  def expand(params, keys, node, first_child, store):
    request = Request(
      node=jnp.broadcast_to(node, (B, 1)),
      first_child=jnp.broadcast_to(first_child, (B, 1)),
      num_rows=jnp.full((B, 1), num_candidates, jnp.int32),
      siblings=jnp.zeros((B, 1, 0), jnp.int32),
    )
    return model.step_fn(params, keys, request, store)

  capacity = 1 + 2 * num_candidates
  root = jax.jit(functools.partial(model.root_fn, capacity=capacity))
  _, _, store = root(params(), PROBLEMS)
  for node, first_child in ((0, 1), (1, 1 + num_candidates)):
    keys = jax.random.split(jax.random.key(node + 8), (B, 1))
    expansion, store = expand(params(), keys, node, first_child, store)
  return store.replace(prompt=None), expansion


@pytest.mark.parametrize(
  "shape, memory, drafts",
  [
    (STEPS, "tree", ("ngram", "perfect")),
    (STEPS, "tokens", ("ngram",)),
    pytest.param(REVISIONS, "tree", ("ngram",), marks=pytest.mark.slow),
  ],
  ids=["steps", "tokens", "revisions"],
)
def test_greedy_candidates_are_those_of_plain_decoding(shape, memory, drafts):
  plain, before = expanded(0, shape=shape, memory=memory)
  for draft in drafts:
    found, after = expanded(draft=draft, shape=shape, memory=memory)
    for name in ("tokens", "lengths", "is_finished", "end_positions", "depth"):
      np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    for name in ("behavior_log_probs", "policy_log_probs", "log_prob"):
      np.testing.assert_allclose(
        getattr(found, name), getattr(plain, name), atol=1e-5
      )
    for name in ("is_valid", "is_terminal", "is_solution", "generated_tokens"):
      np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_allclose(after.value, before.value, atol=1e-5)
    if draft == "perfect":
      # Each call reads a token and K proposals, and all of them are written.
      lengths = np.asarray(found.lengths)[:, 4:7]
      calls = -(-lengths // (K + 1)).sum(1)
      np.testing.assert_array_equal(after.forward_tokens, (K + 1) * calls)


@jax.jit
def full_logits(texts):
  positions = jnp.broadcast_to(jnp.arange(texts.shape[1])[None], texts.shape)
  hidden, _ = NETWORK.apply(params(), texts, positions)
  return NETWORK.policy_logits(params(), hidden)


def text_probs(context):
  """Probability of each step behind a context, by enumeration."""
  texts = np.array(list(itertools.product(range(VOCAB), repeat=S)))
  whole = np.c_[np.tile(context, (len(texts), 1)), texts]
  logits = np.asarray(full_logits(whole), np.float64)[:, len(context) - 1 :]
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  found = {}
  for text, rows in zip(texts.tolist(), probs, strict=True):
    ends = [i for i, token in enumerate(text) if token in (EOS, STOP)]
    size = ends[0] + 1 if ends else S
    found[tuple(text[:size])] = np.prod(rows[np.arange(size), text[:size]])
  return found


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_drawn_candidates_are_distributed_as_by_plain_sampling(draft):
  store, expansion = expanded(
    draft=draft, num_candidates=MANY, controls=make_controls()
  )
  tokens, lengths = np.asarray(store.tokens), np.asarray(store.lengths)
  for row in range(B):
    prompt = PROBLEMS.tokens[row, : PROBLEMS.lengths[row]].tolist()
    expected = text_probs(prompt + tokens[row, 1, : lengths[row, 1]].tolist())
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for node in range(1 + MANY, 1 + 2 * MANY):
      counts[tuple(tokens[row, node, : lengths[row, node]].tolist())] += 1
    likely = [text for text, p in expected.items() if p * MANY >= 8]
    want = MANY * np.array([expected[text] for text in likely])
    seen = np.array([counts[text] for text in likely])
    want, seen = (
      np.append(want, MANY - want.sum()),
      np.append(seen, MANY - seen.sum()),
    )
    degrees = len(want) - 1
    statistic = ((seen - want) ** 2 / want).sum()
    assert degrees > 20
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
  assert np.all(expansion.forward_tokens % (K + 1) == 0)


@functools.cache
def answers(num_proposals, data, memory):
  """Texts and costs of the greedy strategy, with a draft policy on a mesh."""
  policy = policies.tiny_policy()
  search = Solver(
    policy,
    strategy="greedy",
    batch_size=2,
    mesh=mesh_lib.make_mesh({"data": data}),
    task=policies.countdown(),
    memory=memory,
    num_proposals=num_proposals,
    draft=ModelDraft(policies.tiny_params(), policy.network),
  )
  problems = policies.countdown().heldout_problems(2)
  found = search(policies.tiny_params(), jax.random.key(0), problems)
  return [
    ([s.text for s in one.solutions], one.cost["generated_tokens"])
    for one in found
  ]


def test_the_fields_of_a_solver_reach_the_step_model():
  assert answers(2, 2, "tree") == answers(0, 1, "tokens")
  with pytest.raises(ValueError, match="num_proposals=10 is no less"):
    answers(10, 1, "tree")


def test_drafts_that_cannot_propose_are_refused():
  other = make_network(TransformerConfig(**{**vars(CONFIG), "vocab_size": 9}))
  tokens = StepShape(
    max_step_tokens=1, max_depth=4, goes_on_where_cut=True, enumerates=True
  )
  long = StepShape(max_step_tokens=8, max_depth=1)
  for shape, options, words in (
    (STEPS, {"num_proposals": -1}, "num_proposals=-1 must be 1 or more"),
    (STEPS, {"num_proposals": 4}, "no less than the 4 tokens of a step"),
    (tokens, {"num_proposals": 1}, "no less than the 1 tokens of a step"),
    (
      long,
      {"num_proposals": 2, "draft": ModelDraft({}, other)},
      "vocabulary of 9 tokens .* one of 6",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      make_step_model(
        NETWORK,
        shape,
        num_candidates=2,
        eos_id=EOS,
        pad_id=PAD,
        controls=GREEDY,
        **options,
      )
