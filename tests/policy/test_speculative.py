"""Speculation writes what plain sampling would: by enumeration, by the greedy
text, and by a full forward over what was written."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.cache import prefix_from_prompt
from o1jax.policy.config import TransformerConfig
from o1jax.policy.drafts import ModelDraft, NgramDraft
from o1jax.policy.network import make_network
from o1jax.policy.sample import decode_rows, make_controls
from o1jax.policy.speculative import check_draft, speculate_rows

pytestmark = pytest.mark.usefixtures("quick_programs")

VOCAB, PAD, EOS, STOP = 6, 0, 1, 2
NETWORK = make_network(
  TransformerConfig(
    vocab_size=VOCAB,
    num_layers=1,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    ffn_width=8,
  )
)
PROMPTS = np.array([[3, 4, 5, 3, 4], [5, 5, 4, 0, 0]], np.int32)
LENGTHS = np.array([5, 3], np.int32)
B, G, S, K = 2, 4096, 8, 3
SHORT = 4  # texts of so many tokens are enumerated
CONTROLS = {
  "warm": make_controls(temperature=1.4, top_p=0.97),
  "nucleus": make_controls(temperature=2.0, top_p=0.75),
  "greedy": make_controls(temperature=0.0, top_p=0.9),
}


def make_params(seed):
  """Clear preferences, and ends that do not come at once."""
  params = jax.tree.map(lambda x: x * 1.5, NETWORK.init(jax.random.key(seed)))
  kernel = params["policy_head"]["kernel"]
  params["policy_head"]["kernel"] = kernel.at[:, 1:3].multiply(0.6)
  return params


PARAMS, OTHER = make_params(6), make_params(0)
DRAFTS = {
  "perfect": ModelDraft(PARAMS, NETWORK),
  "model": ModelDraft(OTHER, NETWORK),
  "ngram": NgramDraft(2),
}
FORCED = np.array([[STOP, 4, EOS, 3, 3], [5, 0, 0, 0, 0]], np.int32)


@jax.jit
def speculate(draft, controls, is_active, num_forced):
  prefix, last = prefix_from_prompt(NETWORK, PARAMS, PROMPTS, LENGTHS)
  return speculate_rows(
    NETWORK,
    PARAMS,
    jax.random.split(jax.random.key(5), (B, G)),
    last,
    LENGTHS,
    prefix,
    num_rows=G,
    max_new_tokens=S,
    stop_ids=(STOP,),
    eos_id=EOS,
    pad_id=PAD,
    controls=controls,
    draft=draft,
    num_proposals=K,
    context_tokens=PROMPTS,
    context_lengths=LENGTHS,
    is_active=is_active,
    forced_tokens=jnp.broadcast_to(FORCED[:, None], (B, G, FORCED.shape[1])),
    forced_lengths=jnp.broadcast_to(num_forced[:, None], (B, G)),
    with_certainty=True,
  )


@functools.cache
def speculated(draft, controls, num_active=G, with_forced=False):
  """Rows of a draft under settings, on the host."""
  is_active = np.broadcast_to(np.arange(G)[None] < num_active, (B, G))
  num_forced = np.array([5, 1] if with_forced else [0, 0])
  rows = speculate(DRAFTS[draft], CONTROLS[controls], is_active, num_forced)
  return jax.tree.map(np.asarray, rows)


@jax.jit
def full_forward(texts):
  positions = jnp.broadcast_to(jnp.arange(texts.shape[1])[None], texts.shape)
  hidden, prefix = NETWORK.apply(PARAMS, texts, positions)
  return hidden, NETWORK.policy_logits(PARAMS, hidden), prefix


def oracle_probs(logits, controls):
  """The distribution to draw from `[V]`, in float64."""
  logits, top_p = np.asarray(logits, np.float64), float(controls.top_p)
  if controls.temperature == 0:
    return np.eye(VOCAB)[np.argmax(logits)]
  probs = np.exp((logits - logits.max()) / float(controls.temperature))
  probs /= probs.sum()
  order = np.argsort(-probs)
  kept = order[np.cumsum(probs[order]) - probs[order] < top_p]
  out = np.zeros(VOCAB)
  out[kept] = probs[kept]
  return out / out.sum()


def text_probs(prompt, controls):
  """Probability of each text of at most SHORT tokens, by enumeration."""
  texts = np.array(list(itertools.product(range(VOCAB), repeat=SHORT)))
  whole = np.c_[np.tile(prompt, (len(texts), 1)), texts]
  logits = np.asarray(full_forward(whole)[1])[:, len(prompt) - 1 :]
  found = {}
  for text, rows in zip(texts, logits, strict=True):
    probability, written = 1.0, []
    for token, row in zip(text, rows, strict=False):
      probability *= oracle_probs(row, controls)[token]
      written.append(int(token))
      if token in (EOS, STOP):
        break
    found[tuple(written)] = probability
  return found


@pytest.mark.parametrize("controls", ["warm", "nucleus"])
@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_texts_are_distributed_as_by_plain_sampling(draft, controls):
  rows = speculated(draft, controls)
  for b in range(B):
    expected = text_probs(PROMPTS[b, : LENGTHS[b]], CONTROLS[controls])
    assert abs(sum(expected.values()) - 1) < 1e-6
    counts = dict.fromkeys(expected, 0)
    for g in range(G):
      n = min(rows.lengths[b, g], SHORT)
      counts[tuple(rows.tokens[b, g, :n].tolist())] += 1
    likely = [t for t, p in expected.items() if p * G >= 8]
    rare = 1 - sum(expected[t] for t in likely)
    want = np.array([expected[t] for t in likely] + [rare]) * G
    seen = np.array([counts[t] for t in likely])
    seen = np.append(seen, G - seen.sum())
    if rare < 1e-6:
      assert seen[-1] == 0
      want, seen = want[:-1], seen[:-1]
    statistic = ((seen - want) ** 2 / want).sum()
    degrees = len(want) - 1
    assert degrees > 5
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
  assert rows.num_calls.sum() < rows.lengths.sum()


@pytest.mark.parametrize("draft", ["perfect", "model", "ngram"])
def test_greedy_is_plain_greedy(draft):
  @jax.jit
  def plain():
    prefix, last = prefix_from_prompt(NETWORK, PARAMS, PROMPTS, LENGTHS)
    return decode_rows(
      NETWORK,
      PARAMS,
      jax.random.split(jax.random.key(5), (B, 1)),
      last,
      LENGTHS,
      prefix,
      num_rows=1,
      max_new_tokens=S,
      stop_ids=(STOP,),
      eos_id=EOS,
      pad_id=PAD,
      controls=CONTROLS["greedy"],
    )

  want, found = plain(), speculated(draft, "greedy")
  for name in ("tokens", "lengths", "ended", "stopped", "behavior_log_probs"):
    wanted = np.asarray(getattr(want, name))
    wanted = np.broadcast_to(wanted, (B, G, *wanted.shape[2:]))
    np.testing.assert_array_equal(getattr(found, name), wanted)
  assert want.lengths.min() == S and found.num_calls.min() < S


@pytest.mark.parametrize("controls", ["warm", "greedy"])
def test_a_perfect_draft_is_always_accepted(controls):
  rows = speculated("perfect", controls)
  np.testing.assert_array_equal(rows.num_calls, -(-rows.lengths // (K + 1)))
  assert rows.lengths.max() == S


@pytest.mark.parametrize("draft", ["perfect", "model", "ngram"])
@pytest.mark.parametrize("with_forced", [False, True], ids=["free", "forced"])
def test_rows_are_those_of_a_full_forward(draft, with_forced):
  """Log-probs, hidden states, keys, values and ends of what was written."""
  rows = speculated(draft, "warm", with_forced=with_forced)
  counts = [5, 1] if with_forced else [0, 0]
  some = 40
  texts = np.zeros((B, some, LENGTHS.max() + S), np.int32)
  for b, g in np.ndindex(B, some):
    n, m = LENGTHS[b], rows.lengths[b, g]
    texts[b, g, : n + m] = np.r_[PROMPTS[b, :n], rows.tokens[b, g, :m]]
  hidden, logits, prefix = full_forward(texts.reshape(B * some, -1))
  logits = np.asarray(logits, np.float64)
  close = functools.partial(np.testing.assert_allclose, atol=3e-5)
  ways = set()
  for b, g in np.ndindex(B, some):
    i, n, m = b * some + g, LENGTHS[b], rows.lengths[b, g]
    tokens, forced = rows.tokens[b, g], counts[b]
    assert (tokens[:forced] == FORCED[b, :forced]).all()
    assert (tokens[m:] == PAD).all()
    assert not {EOS, STOP} & set(tokens[forced : m - 1])
    ended, stopped = rows.ended[b, g], rows.stopped[b, g]
    free = m > forced
    assert ended == (free and tokens[m - 1] == EOS)
    assert stopped == (free and tokens[m - 1] == STOP)
    assert ended or stopped or m == S
    ways.add((bool(ended), bool(stopped)))
    for t in range(m):
      row = logits[i, n + t - 1]
      policy = row[tokens[t]] - np.log(np.exp(row).sum())
      close(rows.policy_log_probs[b, g, t], 0.0 if t < forced else policy)
      drawn = oracle_probs(row, CONTROLS["warm"])
      behavior = 0.0 if t < forced else np.log(drawn[tokens[t]])
      close(rows.behavior_log_probs[b, g, t], behavior)
    drawn_at = logits[i, n + forced - 1 : n + m - 1]
    confidence, entropy = 0.0, 0.0
    for row, token in zip(drawn_at, tokens[forced:m], strict=True):
      probs = np.exp(row) / np.exp(row).sum()
      confidence += probs[token] / np.sort(probs)[-5:].sum()
      entropy -= (probs * np.log(probs)).sum()
    close(rows.confidence[b, g], confidence)
    close(rows.entropy[b, g], entropy)
    close(rows.last_hidden[b, g], hidden[i, n + m - 1])
    for name in ("keys", "values"):
      kept = getattr(rows, name)[0][b, g, :, :m]
      close(kept, getattr(prefix, name)[0][i, :, n : n + m])
  assert len(ways) == 3


def test_inactive_rows_write_nothing_and_change_nothing():
  some, all_ = speculated("model", "warm", 7), speculated("model", "warm")
  np.testing.assert_array_equal(some.tokens[:, :7], all_.tokens[:, :7])
  np.testing.assert_array_equal(some.lengths[:, :7], all_.lengths[:, :7])
  for name in ("tokens", "lengths", "ended", "stopped", "num_calls"):
    assert not getattr(some, name)[:, 7:].any()


def oracle_lookup(text, max_ngram):
  """What follows the longest, then latest, earlier match of the text's end."""
  for size in range(max_ngram, 0, -1):
    for end in range(len(text) - 1, size - 1, -1):
      if text[end - size : end] == text[-size:]:
        return text[end : end + K]
  return []


def test_lookup_repeats_what_followed():
  rng = np.random.default_rng(0)
  context = rng.integers(0, 4, (6, 7)).astype(np.int32)
  lengths = rng.integers(1, 8, 6).astype(np.int32)
  tokens = rng.integers(0, 4, (6, 3, 5)).astype(np.int32)
  written = rng.integers(1, 6, (6, 3)).astype(np.int32)
  draft = NgramDraft(3)
  found, _ = jax.jit(draft.propose)(
    draft.start(context, lengths, 3, 5),
    tokens,
    written,
    np.zeros((6, 3, K), np.float32),
    CONTROLS["warm"],
  )
  sizes = set()
  for b, g in np.ndindex(6, 3):
    text = [*context[b, : lengths[b]], *tokens[b, g, : written[b, g]]]
    want = oracle_lookup([int(t) for t in text], 3)
    sizes.add(len(want))
    assert found.counts[b, g] == len(want)
    assert found.tokens[b, g, : len(want)].tolist() == want
  assert len(sizes) > 2


def test_the_network_is_traced_once():
  traces = []

  def counted(*args, **kwargs):
    traces.append(1)
    return NETWORK.apply(*args, **kwargs)

  def run(params, controls):
    prefix, last = prefix_from_prompt(NETWORK, params, PROMPTS, LENGTHS)
    return speculate_rows(
      NETWORK._replace(apply=counted),
      params,
      jax.random.split(jax.random.key(5), (B, 2)),
      last,
      LENGTHS,
      prefix,
      num_rows=2,
      max_new_tokens=S,
      stop_ids=(),
      eos_id=EOS,
      pad_id=PAD,
      controls=controls,
      draft=NgramDraft(),
      num_proposals=K,
      context_tokens=PROMPTS,
      context_lengths=LENGTHS,
    )

  lowered = jax.jit(run)
  for temperature in (0.5, 1.0):
    lowered.lower(PARAMS, make_controls(temperature=temperature))
  assert len(traces) == 1


def test_bad_drafts_are_refused():
  other = make_network(dataclasses.replace(NETWORK.config, vocab_size=9))
  with pytest.raises(ValueError, match="vocabulary of 9 tokens .* one of 6"):
    check_draft(NETWORK, ModelDraft({}, other), K)
  with pytest.raises(ValueError, match="num_proposals=0 must be 1 or more"):
    check_draft(NETWORK, NgramDraft(), 0)
