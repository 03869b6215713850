"""Draws against NumPy oracles; decoded rows against a full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.cache import Prefix, join, make_cache, prefix_from_prompt
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network, next_token_log_probs
from o1jax.policy.sample import (
  decode_rows,
  make_controls,
  sample_tokens,
  shape_logits,
)

VOCAB = 43  # no multiple of the sampler's blocks
PAD, EOS, STOP = 0, 1, 2


def oracle_probs(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """The distribution to draw from, `[V]` float64, one token at a time."""
  logits = np.asarray(logits, np.float64)
  if temperature == 0:
    return np.eye(len(logits))[np.argmax(logits)]
  probs = np.exp((logits - logits.max()) / temperature)
  probs /= probs.sum()
  order = sorted(range(len(probs)), key=lambda i: -probs[i])
  kept = order[:top_k] if top_k else order
  mass = probs[kept].sum()
  nucleus, so_far = [], 0.0
  for i in kept:
    if so_far >= top_p * mass and nucleus:
      break
    nucleus.append(i)
    so_far += probs[i]
  nucleus = [i for i in nucleus if probs[i] >= min_p * probs.max()]
  out = np.zeros_like(probs)
  out[nucleus] = probs[nucleus]
  return out / out.sum()


SETTINGS = [
  {},
  {"temperature": 0.6},
  {"top_k": 5},
  {"top_p": 0.7},
  {"min_p": 0.2},
  {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
]
COUNT = 20000  # draws in one call, always, so that few programs are compiled
draw = jax.jit(sample_tokens)
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings):
  """The grid of uniforms maps to tokens as the exact inverse CDF does."""
  uniforms = (np.arange(COUNT) + 0.5) / COUNT
  logits = np.broadcast_to(LOGITS, (COUNT, VOCAB))
  tokens, behavior, policy = draw(
    logits, uniforms.astype(np.float32), make_controls(**settings)
  )
  probs = oracle_probs(LOGITS, **settings)
  reached = np.cumsum(probs)
  want = np.minimum(np.searchsorted(reached, uniforms, "right"), VOCAB - 1)
  differs = np.asarray(tokens) != want
  nearest = np.abs(uniforms[differs][:, None] - reached[None]).min(1, initial=1)
  assert (nearest < 1e-5).all()
  drawn = set(np.unique(tokens))
  assert set(np.nonzero(probs > 2 / COUNT)[0]) <= drawn
  assert drawn <= set(np.nonzero(probs)[0])
  np.testing.assert_allclose(behavior, np.log(probs[tokens]), atol=2e-5)
  np.testing.assert_allclose(
    policy, np.log(oracle_probs(LOGITS)[tokens]), atol=2e-5
  )


def test_frequencies_match_by_chi_square():
  uniforms = jax.random.uniform(jax.random.key(0), (COUNT,))
  logits = np.broadcast_to(LOGITS, (COUNT, VOCAB))
  tokens, _, _ = draw(logits, uniforms, make_controls())
  expected = oracle_probs(LOGITS) * COUNT
  observed = np.bincount(tokens, minlength=VOCAB)
  statistic = ((observed - expected) ** 2 / expected).sum()
  assert statistic < 80  # 42 degrees of freedom: 0.9996


def test_greedy_takes_the_first_of_the_likeliest():
  logits = np.full((4, VOCAB), -1.0, np.float32)
  logits[0, 7] = 2.0
  logits[1, [9, 30]] = 2.0
  logits[2, 42] = 1e-6 - 1.0
  uniforms = np.full(COUNT, 0.999, np.float32)
  tokens, behavior, policy = (
    np.asarray(x)[:4]
    for x in draw(
      np.tile(logits, (COUNT // 4, 1)), uniforms, make_controls(temperature=0)
    )
  )
  assert tokens.tolist() == [7, 9, 42, 0]
  assert (np.asarray(behavior) == 0).all()
  want = [np.log(oracle_probs(x)[t]) for x, t in zip(logits, tokens)]  # noqa: B905
  np.testing.assert_allclose(policy, want, atol=1e-5)


def test_what_has_no_mass_is_never_drawn():
  """The ends of the unit interval and rounded sums stay inside the support."""
  rng = np.random.default_rng(1)
  logits = rng.normal(0, 3, (COUNT, VOCAB)).astype(np.float32)
  logits[rng.random(logits.shape) < 0.7] = -np.inf
  logits[:, 11] = 0.0
  largest = np.nextafter(np.float32(1), np.float32(0))
  for uniform in (0.0, 0.5, largest):
    tokens, behavior, _ = draw(
      logits, np.full(COUNT, uniform, np.float32), make_controls()
    )
    assert np.isfinite(logits[np.arange(COUNT), tokens]).all()
    assert np.isfinite(behavior).all()


def test_truncation_keeps_ties_together():
  logits = np.array([2.0, 1.0, 1.0, 0.0], np.float32)[None]
  kept = shape_logits(logits, make_controls(top_k=2)) > -1e29
  assert kept[0].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ({"min_p": 1.5}, "min_p=1.5"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make_controls(**settings)


# ------------------------------------------------------------- decoded rows

CONFIG = TransformerConfig(
  vocab_size=VOCAB,
  num_layers=1,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  ffn_width=24,
  value_hidden_width=8,
)
NETWORK = make_network(CONFIG)
B, G, P, S = 3, 4, 6, 10
PROMPTS = np.random.default_rng(2).integers(3, VOCAB, (B, P)).astype(np.int32)
LENGTHS = np.array([6, 3, 5], np.int32)


@functools.cache
def make_params():
  params = NETWORK.init(jax.random.key(3))
  # Ends and stops come up often, and values differ.
  kernel = params["policy_head"]["kernel"]
  params["policy_head"]["kernel"] = kernel.at[:, :3].multiply(2.5)
  out = params["value_head"]["out"]
  out["kernel"] = jax.random.normal(jax.random.key(4), out["kernel"].shape)
  return params


def row_keys(seeds):
  """One key per row, derived from a problem's seed and the row."""
  rows = jnp.arange(G, dtype=jnp.uint32)

  def one(seed):
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

  return jax.vmap(one)(jnp.asarray(seeds, jnp.uint32))


@jax.jit
def decode(params, seeds, prompts, lengths, controls, is_active, forced=None):
  prefix, last = prefix_from_prompt(NETWORK, params, prompts, lengths)
  rows = decode_rows(
    NETWORK,
    params,
    row_keys(seeds),
    last,
    lengths,
    prefix,
    num_rows=G,
    max_new_tokens=S,
    stop_ids=(STOP,),
    eos_id=EOS,
    pad_id=PAD,
    controls=controls,
    is_active=is_active,
    forced_tokens=None if forced is None else forced[0],
    forced_lengths=None if forced is None else forced[1],
    watched_ids=WATCHED,
  )
  return prefix, rows


SEEDS = np.array([5, 6, 7])
WATCHED = (4, 6)
WARM = {"temperature": 1.3, "top_p": 0.9}


@functools.cache
def decoded():
  """Rows for all three prompts, and the full forward over the same text."""
  controls = make_controls(**WARM)
  everyone = np.ones((B, G), bool)
  prefix, rows = decode(
    make_params(), SEEDS, PROMPTS, LENGTHS, controls, everyone
  )
  rows = jax.tree.map(np.asarray, rows)
  texts = np.zeros((B, G, P + S), np.int32)
  for b, g in np.ndindex(B, G):
    n, m = LENGTHS[b], rows.lengths[b, g]
    texts[b, g, :n] = PROMPTS[b, :n]
    texts[b, g, n : n + m] = rows.tokens[b, g, :m]
  texts_and_one = np.pad(texts, ((0, 0), (0, 0), (0, 1)))
  return prefix, rows, texts, full_forward(texts_and_one)


def full_forward(texts):
  """Hidden states, logits, next log-probs, value logits: `[B, G, T, ...]`."""
  out = read_whole(make_params(), texts.reshape(B * G, -1))
  return [np.asarray(x).reshape(B, G, *x.shape[1:]) for x in out]


@jax.jit
def read_whole(params, texts):
  positions = jnp.broadcast_to(jnp.arange(texts.shape[1])[None], texts.shape)
  hidden, _ = NETWORK.apply(params, texts, positions)
  total = jnp.full(texts.shape[:1], texts.shape[1])
  trained = next_token_log_probs(NETWORK, params, texts, total)
  return hidden, NETWORK.policy_logits(params, hidden), *trained


def test_log_probs_are_those_of_a_full_forward():
  _, rows, _, (_, logits, log_probs, _) = decoded()
  for b, g in np.ndindex(B, G):
    n, m = LENGTHS[b], rows.lengths[b, g]
    np.testing.assert_allclose(
      rows.policy_log_probs[b, g, :m],
      log_probs[b, g, n - 1 : n - 1 + m],
      atol=1e-5,
    )
    for t in range(m):
      probs = oracle_probs(logits[b, g, n - 1 + t], **WARM)
      np.testing.assert_allclose(
        rows.behavior_log_probs[b, g, t],
        np.log(probs[rows.tokens[b, g, t]]),
        atol=2e-5,
      )
    last = jax.nn.log_softmax(logits[b, g, n - 2 + m])
    np.testing.assert_allclose(
      rows.watched[b, g], last[np.array(WATCHED)], atol=1e-5
    )
    assert (rows.policy_log_probs[b, g, m:] == 0).all()
    assert (rows.behavior_log_probs[b, g, m:] == 0).all()


def test_rows_end_where_they_say():
  _, rows, _, _ = decoded()
  seen = set()
  for b, g in np.ndindex(B, G):
    tokens, m = rows.tokens[b, g], rows.lengths[b, g]
    ended, stopped = bool(rows.ended[b, g]), bool(rows.stopped[b, g])
    seen.add((ended, stopped))
    assert not {EOS, STOP} & set(tokens[: m - 1])
    assert (tokens[m:] == PAD).all()
    assert ended == (tokens[m - 1] == EOS)
    assert stopped == (tokens[m - 1] == STOP)
    assert ended or stopped or m == S
  assert {(True, False), (False, True)} <= seen


def test_last_hidden_is_at_the_last_token():
  _, rows, _, (hidden, _, _, values) = decoded()
  value = NETWORK.value_logits(make_params(), rows.last_hidden)
  for b, g in np.ndindex(B, G):
    last = LENGTHS[b] + rows.lengths[b, g] - 1
    np.testing.assert_allclose(
      rows.last_hidden[b, g], hidden[b, g, last], atol=1e-5
    )
    np.testing.assert_allclose(value[b, g], values[b, g, last], atol=1e-5)


def test_keys_and_values_serve_as_the_next_prefix():
  """What a tree stores per node: row 2's step becomes context."""
  prefix, rows, texts, _ = decoded()
  lengths = rows.lengths[:, 2]
  slots = np.arange(S)[None]
  step = Prefix(
    keys=tuple(k[:, 2] for k in rows.keys),
    values=tuple(v[:, 2] for v in rows.values),
    positions=jnp.asarray(LENGTHS[:, None] + slots),
    mask=jnp.asarray(slots < lengths[:, None]),
  )
  cache = make_cache(join([prefix, step]), num_rows=1, capacity=1)
  new = np.full((B, 1, 1), 17, np.int32)
  at = (LENGTHS + lengths)[:, None, None]
  hidden, _ = jax.jit(NETWORK.apply)(make_params(), new, at, cache)
  longer = np.pad(texts, ((0, 0), (0, 0), (0, 1)))
  for b in range(B):
    longer[b, 2, LENGTHS[b] + lengths[b]] = 17
  want = full_forward(longer)[0]
  for b in range(B):
    end = LENGTHS[b] + lengths[b]
    np.testing.assert_allclose(hidden[b, 0, 0], want[b, 2, end], atol=1e-5)


def test_a_prompt_in_a_batch_is_as_alone():
  _, rows, _, _ = decoded()
  controls, everyone = make_controls(**WARM), np.ones((B, G), bool)
  # The same program with the prompt in another row, among other prompts.
  for b in range(B):
    place = (b + 1) % B
    prompts = np.full((B, P), 9, np.int32)
    lengths = np.full(B, 2, np.int32)
    seeds = np.full(B, 99)
    prompts[place], lengths[place] = PROMPTS[b], LENGTHS[b]
    seeds[place] = SEEDS[b]
    prompts[place, LENGTHS[b] :] = 30  # other waste behind the prompt
    _, alone = decode(
      make_params(), seeds, prompts, lengths, controls, everyone
    )
    np.testing.assert_array_equal(alone.tokens[place], rows.tokens[b])
    np.testing.assert_allclose(
      alone.behavior_log_probs[place], rows.behavior_log_probs[b], atol=1e-5
    )
    np.testing.assert_allclose(
      alone.last_hidden[place], rows.last_hidden[b], atol=1e-5
    )


def test_inactive_rows_write_nothing():
  _, rows, _, _ = decoded()
  is_active = np.ones((B, G), bool)
  is_active[1] = False
  is_active[2, 1:] = False
  _, some = decode(
    make_params(), SEEDS, PROMPTS, LENGTHS, make_controls(**WARM), is_active
  )
  assert (np.asarray(some.lengths)[~is_active] == 0).all()
  assert (np.asarray(some.tokens)[~is_active] == PAD).all()
  assert not np.asarray(some.ended | some.stopped)[~is_active].any()
  np.testing.assert_array_equal(
    np.asarray(some.tokens)[is_active], np.asarray(rows.tokens)[is_active]
  )


def test_forced_tokens_come_first_and_rows_go_on_behind_them():
  """Ends and stops among the forced tokens are not seen."""
  forced = np.array([[STOP, 4, EOS], [5, 6, 7], [3, 3, 3]], np.int32)
  counts = np.array([3, 1, 0], np.int32)
  controls = make_controls(**WARM)
  everyone = np.ones((B, G), bool)
  arguments = (make_params(), SEEDS, PROMPTS, LENGTHS, controls, everyone)
  each = np.repeat(forced[:, None], G, 1), np.repeat(counts[:, None], G, 1)
  _, rows = decode(*arguments, each)
  _, free = decode(*arguments)
  for b, count in enumerate(counts):
    assert (np.asarray(rows.tokens)[b, :, :count] == forced[b, :count]).all()
    assert not np.asarray(rows.behavior_log_probs)[b, :, :count].any()
    assert (np.asarray(rows.lengths)[b] >= count).all()
  tokens = np.asarray(rows.tokens)
  texts = np.zeros((B * G, P + S), np.int32)
  ends = (LENGTHS[:, None] + np.asarray(rows.lengths)).reshape(-1)
  for b, g in np.ndindex(B, G):
    text = np.r_[PROMPTS[b, : LENGTHS[b]], tokens[b, g]]
    texts[b * G + g, : len(text)] = text
  log_probs, _ = next_token_log_probs(NETWORK, make_params(), texts, ends)
  for b, g in np.ndindex(B, G):
    count, first = int(rows.lengths[b, g]), LENGTHS[b] - 1
    expected = np.array(log_probs[b * G + g, first : first + count])
    expected[: counts[b]] = 0  # given, not chosen
    np.testing.assert_allclose(
      rows.policy_log_probs[b, g, :count], expected, atol=1e-5
    )
  np.testing.assert_array_equal(rows.tokens[2], free.tokens[2])


def test_the_network_is_traced_once_and_settings_do_not_compile():
  traces = []

  def counted(*args, **kwargs):
    traces.append(1)
    return NETWORK.apply(*args, **kwargs)

  network = NETWORK._replace(apply=counted)

  def run(params, keys, last, controls):
    prefix = Prefix(
      keys=(jnp.zeros((1, 2, 4, 8)),),
      values=(jnp.zeros((1, 2, 4, 8)),),
      positions=jnp.zeros((1, 4), jnp.int32),
      mask=jnp.ones((1, 4), bool),
    )
    return decode_rows(
      network,
      params,
      keys,
      last,
      jnp.array([4]),
      prefix,
      num_rows=G,
      max_new_tokens=S,
      stop_ids=(),
      eos_id=EOS,
      pad_id=PAD,
      controls=controls,
    ).tokens

  lowered = jax.jit(run)
  for temperature in (0.5, 1.0):
    lowered.lower(
      make_params(),
      row_keys([1]),
      jnp.zeros((1, 16)),
      make_controls(temperature=temperature),
    )
  assert len(traces) == 1
