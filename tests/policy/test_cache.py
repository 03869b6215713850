"""Smaller prefixes: int8, without what windows do not reach, read in chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy import cache as cache_module
from o1jax.policy.attention import cached_attention
from o1jax.policy.cache import (
  join,
  keep_window,
  make_cache,
  prefix_from_prompt,
  quantize_prefix,
)
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.quantize import Quantized, dequantize, quantize

CONFIG = TransformerConfig(
  vocab_size=29,
  num_layers=2,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  ffn_width=24,
)
STREAMING = dataclasses.replace(CONFIG, sliding_window=(4, 3), num_sinks=2)
B, G, P = 2, 3, 19
RNG = np.random.default_rng(4)
PROMPTS = RNG.integers(0, 29, (B, P)).astype(np.int32)
LENGTHS = np.array([19, 11], np.int32)
NEW = RNG.integers(0, 29, (B, G, 5)).astype(np.int32)
PARAMS = make_network(CONFIG).init(jax.random.key(0))
fast_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def continued(network, prefix):
  """Log-probs after each of the tokens NEW behind a prefix."""
  cache = make_cache(prefix, num_rows=G, capacity=NEW.shape[2])
  at = jnp.asarray(LENGTHS)[:, None, None] + jnp.arange(5)[None, None]
  at = jnp.broadcast_to(at, NEW.shape)
  hidden, _ = network.apply(PARAMS, jnp.asarray(NEW), at, cache, slot=0)
  return jax.nn.log_softmax(network.policy_logits(PARAMS, hidden))


def read(config=CONFIG, prompts=PROMPTS, **options):
  """The prefix, the last hidden state and log-probs after the tokens NEW."""
  network = make_network(config)

  @fast_jit
  def run(prompts):
    prefix, last = prefix_from_prompt(
      network, PARAMS, prompts, LENGTHS, **options
    )
    return prefix, last, continued(network, prefix)

  return run(prompts)


@functools.cache
def plain():
  return read()


def test_groups_of_prompts_are_read_as_all_at_once(monkeypatch):
  network = make_network(CONFIG)
  prompts = RNG.integers(0, 29, (6, P)).astype(np.int32)
  lengths = np.array([19, 11, 1, 7, 19, 3], np.int32)

  def run():
    read_fn = functools.partial(prefix_from_prompt, network)
    program = fast_jit(read_fn).lower(PARAMS, prompts, lengths).compile()
    return program(PARAMS, prompts, lengths), "while" in program.as_text()

  want, is_loop = run()
  assert not is_loop
  monkeypatch.setattr(cache_module, "PROMPT_TOKENS", 2 * P)
  found, is_loop = run()
  assert is_loop
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want
  )


def test_prompts_are_grouped_where_the_batch_divides():
  sizes = cache_module._group_size
  assert sizes(128, 64) == 32 and sizes(64, 256) == 8
  assert sizes(16, 64) == 16  # they fit
  assert sizes(127, 64) == 127  # only groups of one would divide it
  assert sizes(4, 5000) == 4  # no group fits


def test_attention_over_int8_is_that_over_the_numbers_restored():
  queries, keys, values, own = (
    jnp.asarray(RNG.normal(0, 1, shape), jnp.float32)
    for shape in ((2, 3, 2, 2, 2, 8), (2, 2, 6, 8), (2, 2, 6, 8), (6, 2, 4, 8))
  )
  keys, values = quantize(keys, 3), quantize(values, 2)
  masks = (
    jnp.asarray(RNG.random((2, 3, 2, 6)) < 0.7),
    jnp.asarray(RNG.random((1, 1, 2, 4)) < 0.7),
  )
  attend = fast_jit(functools.partial(cached_attention, cap=0.5))
  found, want = (
    attend(queries, prefix, (own, own), *masks)
    for prefix in ((keys, values), (dequantize(keys), dequantize(values)))
  )
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_int8_moves_log_probs_little():
  _, last, want = plain()
  prefix, same_last, found = read(cache_dtype="int8")
  np.testing.assert_array_equal(last, same_last)
  assert prefix.mask.shape == (B, 32)  # two whole blocks
  assert prefix.keys[0].values.dtype == jnp.int8
  error = np.abs(np.asarray(found) - np.asarray(want))
  assert 1e-4 < error.max() < 0.02 and error.mean() < 0.004


def test_int8_does_not_depend_on_waste_behind_the_prompt():
  waste = PROMPTS.copy()
  waste[1, LENGTHS[1] :] = 3
  a, _, one = read(cache_dtype="int8")
  b, _, other = read(cache_dtype="int8", prompts=waste)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  np.testing.assert_array_equal(one, other)


def test_parts_of_unlike_storage_join():
  """Whole blocks, one block a part, and plain numbers behind one another."""
  prefix, _, _ = plain()

  def part(first, count):
    def cut(arrays):
      return tuple(a[:, :, first : first + count] for a in arrays)

    here = slice(first, first + count)
    return prefix.replace(
      keys=cut(prefix.keys),
      values=cut(prefix.values),
      positions=prefix.positions[:, here],
      mask=prefix.mask[:, here],
    )

  parts = [quantize_prefix(part(0, 8), 4), quantize_prefix(part(8, 6), 6)]
  whole = join([*parts, part(14, 5)])
  np.testing.assert_array_equal(whole.mask, prefix.mask)
  for layer in range(CONFIG.num_layers):
    for name in ("keys", "values"):
      got = getattr(whole, name)[layer]
      assert isinstance(got, Quantized)
      want = [dequantize(getattr(p, name)[layer]) for p in parts]
      np.testing.assert_allclose(
        dequantize(got)[:, :, :14], np.concatenate(want, 2), atol=1e-6
      )
      exact = np.asarray(getattr(prefix, name)[layer])[:, :, 14:]
      np.testing.assert_allclose(
        dequantize(got)[:, :, 14:], exact, atol=np.abs(exact).max() / 250
      )


def test_slots_out_of_reach_are_left_out_and_nothing_changes(monkeypatch):
  prefix, last, found = read(STREAMING)
  assert prefix.mask.shape == (B, 2 + 4 - 1)
  for b, length in enumerate(LENGTHS):
    kept = set(np.asarray(prefix.positions[b])[np.asarray(prefix.mask[b])])
    assert kept == {0, 1, *range(length - 3, length)}
  monkeypatch.setattr("o1jax.policy.cache.keep_window", lambda p, *_: p)
  whole, same_last, want = read(STREAMING)
  assert whole.mask.shape == (B, P)
  np.testing.assert_allclose(last, same_last, atol=1e-6)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_int8_slots_are_left_out_with_their_scales():
  prefix, _, _ = plain()
  compressed = quantize_prefix(prefix, 4)
  kept = keep_window(compressed, jnp.asarray(LENGTHS), STREAMING)
  assert kept.mask.all()
  for b in range(B):
    np.testing.assert_array_equal(
      dequantize(kept.values[1])[b],
      dequantize(compressed.values[1])[b][:, kept.positions[b]],
    )


def test_a_layer_that_reads_everything_keeps_everything():
  prefix, _, _ = plain()
  config = dataclasses.replace(CONFIG, sliding_window=(2, None))
  assert keep_window(prefix, jnp.asarray(LENGTHS), config) is prefix


@pytest.mark.parametrize("config", [CONFIG, STREAMING], ids=["full", "window"])
def test_chunks_read_what_the_whole_reads(config):
  _, last, want = read(config)
  _, found_last, found = read(config, prefill_chunk=4)
  np.testing.assert_allclose(found_last, last, atol=1e-5)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_chunks_bound_what_is_read_at_a_time():
  sizes = []
  network = make_network(CONFIG)

  def counted(params, tokens, *args, **kwargs):
    sizes.append(tokens.shape[-1])
    return network.apply(params, tokens, *args, **kwargs)

  fast_jit(
    functools.partial(
      prefix_from_prompt, network._replace(apply=counted), prefill_chunk=8
    )
  )(PARAMS, PROMPTS, LENGTHS)
  assert max(sizes) == 8


@pytest.mark.parametrize(
  "options, message",
  [
    ({"cache_dtype": "int4"}, "cache_dtype='int4' is not one of network, int8"),
    ({"prefill_chunk": 0}, "prefill_chunk=0 must be 1 or more"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    read(**options)
