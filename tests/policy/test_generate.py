"""Generation with growth and compaction = decode_rows; stop strings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from o1jax.mesh import make_mesh
from o1jax.policy import slots
from o1jax.policy.cache import prefix_from_prompt
from o1jax.policy.config import TransformerConfig
from o1jax.policy.drafts import ModelDraft, NgramDraft
from o1jax.policy.generate import (
  _make_find_stop,
  make_generate,
  make_speculative_generate,
)
from o1jax.policy.network import make_network
from o1jax.policy.sample import decode_rows, make_controls
from o1jax.policy.slots import power_of_two

pytestmark = pytest.mark.usefixtures("quick_programs")

VOCAB, PAD, EOS = 19, 0, 1
NETWORK = make_network(
  TransformerConfig(
    vocab_size=VOCAB,
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    ffn_width=16,
  )
)
B, G, P, S = 4, 8, 5, 14
PROMPTS = np.random.default_rng(1).integers(2, VOCAB, (B, P)).astype(np.int32)
LENGTHS = np.array([5, 2, 4, 3], np.int32)
PIECES = [b"", b""] + [bytes([97 + i]) for i in range(VOCAB - 2)]
CONTROLS = make_controls(temperature=1.1)


def make_keys():
  # These rows are compacted twice, with places to fill while row 0 lives on.
  return jax.random.split(jax.random.key(6), (B, G))


@functools.cache
def make_params():
  params = NETWORK.init(jax.random.key(0))
  kernel = params["policy_head"]["kernel"]
  params["policy_head"]["kernel"] = kernel.at[:, EOS].multiply(3.0)
  return params


@functools.cache
def reference():
  @jax.jit
  def run(params, keys):
    prefix, last = prefix_from_prompt(NETWORK, params, PROMPTS, LENGTHS)
    return decode_rows(
      NETWORK,
      params,
      keys,
      last,
      LENGTHS,
      prefix,
      num_rows=G,
      max_new_tokens=S,
      stop_ids=(),
      eos_id=EOS,
      pad_id=PAD,
      controls=CONTROLS,
    )

  return jax.tree.map(np.asarray, run(make_params(), make_keys()))


@functools.cache
def generator(stop_texts=(), segment=7, mesh=None):
  return make_generate(
    NETWORK,
    num_rows=G,
    max_new_tokens=S,
    eos_id=EOS,
    pad_id=PAD,
    stop_texts=stop_texts,
    pieces=PIECES,
    segment=segment,
    mesh=mesh,
  )


def test_growth_and_compaction_change_nothing(monkeypatch):
  sizes = []
  from o1jax.policy import generate as module

  def counted(run, find_stop):
    sizes.append((run.row.shape, run.state.cache.capacity))
    return still_alive(run, find_stop)

  still_alive = module._still_alive
  monkeypatch.setattr(module, "_still_alive", counted)
  want = reference()
  found = generator()(make_params(), make_keys(), PROMPTS, LENGTHS, CONTROLS)
  np.testing.assert_array_equal(found.tokens, want.tokens)
  np.testing.assert_array_equal(found.lengths, want.lengths)
  np.testing.assert_array_equal(found.ended, want.ended)
  np.testing.assert_allclose(
    found.behavior_log_probs, want.behavior_log_probs, atol=1e-5
  )
  np.testing.assert_allclose(
    found.policy_log_probs, want.policy_log_probs, atol=1e-5
  )
  assert len({rows for rows, _ in sizes}) > 2, "not compacted twice"
  assert len({capacity for _, capacity in sizes}) > 1, "nothing grew"
  assert want.lengths.min() < 7 and want.lengths.max() == S


def test_stop_strings_cut_where_the_text_has_them():
  want = reference()
  # A pair of letters that comes up in the middle of some rows.
  texts = [
    b"".join(PIECES[t] for t in want.tokens[p][: want.lengths[p]])
    for p in np.ndindex(B, G)
  ]
  long = max(texts, key=len)
  stop = long[3:5].decode()
  found = generator((stop,), segment=S)(
    make_params(), make_keys(), PROMPTS, LENGTHS, CONTROLS
  )
  assert found.stopped.any() and not found.stopped.all()
  for p, text in zip(np.ndindex(B, G), texts, strict=True):
    n = found.lengths[p]
    assert bool(found.stopped[p]) == (stop.encode() in text)
    if not found.stopped[p]:
      assert n == want.lengths[p] and found.ended[p] == want.ended[p]
      continue
    parts = [PIECES[t] for t in want.tokens[p]]  # pad has no letters
    ends = [i for i in range(S + 1) if stop.encode() in b"".join(parts[:i])]
    assert n == ends[0] and not found.ended[p]
    np.testing.assert_array_equal(found.tokens[p][:n], want.tokens[p][:n])
    assert (found.tokens[p][n:] == PAD).all()
    assert (found.behavior_log_probs[p][n:] == 0).all()
    assert (found.policy_log_probs[p][n:] == 0).all()


MANY, FEW = 32, 3  # problems and rows of each: 96 rows wait for 16 slots
QUEUED = np.random.default_rng(2).integers(2, VOCAB, (MANY, P)).astype(np.int32)
QUEUED_LENGTHS = (1 + np.arange(MANY) % P).astype(np.int32)


@functools.cache
def queued(num_slots=None, stop_texts=(), order=None, **options):
  """What the rows of QUEUED become with so many slots."""
  generate = make_generate(
    NETWORK,
    num_rows=FEW,
    max_new_tokens=S,
    eos_id=EOS,
    pad_id=PAD,
    stop_texts=stop_texts,
    pieces=PIECES,
    segment=5,
    num_slots=num_slots,
    **options,
  )
  keys = jax.random.split(jax.random.key(8), (MANY, FEW))
  order = np.arange(MANY) if order is None else np.array(order)
  return generate(
    make_params(), keys[order], QUEUED[order], QUEUED_LENGTHS[order], CONTROLS
  )


def assert_same_rows(found, want):
  for name in ("tokens", "lengths", "ended", "stopped"):
    np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
  for name in ("behavior_log_probs", "policy_log_probs"):
    np.testing.assert_allclose(
      getattr(found, name), getattr(want, name), atol=1e-5
    )


@pytest.mark.parametrize("num_slots", [16, 5])
def test_waiting_rows_get_freed_slots_and_nothing_changes(num_slots):
  want, found = queued(), queued(num_slots)
  assert_same_rows(found, want)
  assert found.rows_live == want.rows_live == want.lengths.sum()
  assert want.rows_evaluated > 1.25 * want.rows_live
  assert found.rows_live <= found.rows_evaluated <= 1.25 * found.rows_live


def test_stop_strings_end_rows_that_wait_too():
  want = queued(stop_texts=("f", "kb"))
  assert want.stopped.any() and not want.stopped.all()
  assert_same_rows(queued(16, ("f", "kb")), want)


def test_rows_do_not_depend_on_their_slot():
  backwards = queued(16, order=tuple(range(MANY))[::-1])
  want = queued(16)
  np.testing.assert_array_equal(backwards.tokens[::-1], want.tokens)
  np.testing.assert_array_equal(backwards.lengths[::-1], want.lengths)


def test_a_prompt_is_read_once_for_all_its_rows(monkeypatch):
  from o1jax.policy import slots

  seen, read = [], slots.read_prompts

  def counted(network, params, tokens, lengths, **options):
    seen.append(np.asarray(tokens))
    return read(network, params, tokens, lengths, **options)

  monkeypatch.setattr(slots, "read_prompts", counted)
  queued.__wrapped__(16)
  assert len(seen) == MANY // 16
  np.testing.assert_array_equal(np.concatenate(seen), QUEUED)


def test_compressed_and_chunked_prompts_are_as_good():
  want = queued()
  chunked = queued(prefill_chunk=2)
  np.testing.assert_array_equal(chunked.tokens, want.tokens)
  short = queued(16, cache_dtype="int8")
  same = (short.tokens == want.tokens).all(-1)
  assert 0.8 < same.mean()
  error = np.abs(short.policy_log_probs - want.policy_log_probs)[same]
  assert 1e-5 < error.max() < 0.05


def test_speculation_writes_the_greedy_texts_in_fewer_calls():
  greedy = make_controls(temperature=0.0)
  want = generator()(make_params(), make_keys(), PROMPTS, LENGTHS, greedy)
  generate = make_speculative_generate(
    NETWORK, num_rows=G, max_new_tokens=S, eos_id=EOS, pad_id=PAD
  )
  rows = make_keys(), PROMPTS, LENGTHS, greedy
  found = generate(make_params(), NgramDraft(), *rows)
  assert_same_rows(found, want)
  assert found.rows_live < found.lengths.sum() == want.rows_live
  assert found.rows_live <= found.rows_evaluated
  small = make_network(dataclasses.replace(NETWORK.config, vocab_size=7))
  with pytest.raises(ValueError, match="vocabulary of 7 tokens"):
    generate(make_params(), ModelDraft({}, small), *rows)


def test_devices_with_rows_of_their_own_change_nothing():
  mesh = make_mesh({"data": 2, "fsdp": 2})
  found = generator(mesh=mesh)(
    make_params(), make_keys(), PROMPTS, LENGTHS, CONTROLS
  )
  alone = generator()(make_params(), make_keys(), PROMPTS, LENGTHS, CONTROLS)
  assert_same_rows(found, alone)
  assert_same_rows(queued(num_slots=16, mesh=mesh), queued())


def test_devices_wait_for_nobody_within_a_segment():
  mesh = make_mesh({"data": 4})
  run = slots.start_together(
    NETWORK,
    make_params(),
    make_keys(),
    PROMPTS,
    LENGTHS,
    capacity=S,
    max_new_tokens=S,
    pad_id=PAD,
    cache_dtype="network",
    prefill_chunk=None,
  )
  lowered = slots.advance.lower(
    NETWORK,
    make_params(),
    run.state,
    run.uniforms,
    run.next_positions,
    S,
    CONTROLS,
    1,
    EOS,
    PAD,
    mesh,
  )
  program = lowered.compile().as_text()
  exchanges = [line for line in program.splitlines() if "all-reduce(" in line]
  assert len(exchanges) == 1 and "while/body" not in exchanges[0]
  for other in ("all-gather(", "all-to-all(", "collective-permute("):
    assert other not in program


def test_prompts_that_do_not_divide_over_devices_are_refused():
  generate = generator(mesh=make_mesh({"data": 8}))
  with pytest.raises(ValueError, match="number of prompts=4 does not divide"):
    generate(make_params(), make_keys(), PROMPTS, LENGTHS, CONTROLS)


def test_find_stop_reads_across_pieces():
  pieces = [b"", b"ab", b"c", b"\nAns", b"wer: x", b"."]
  find_stop = _make_find_stop((b"Answer:", b"c."), pieces)
  assert find_stop([1, 2, 3]) is None
  assert find_stop([1, 3, 4, 5]) == 3
  assert find_stop([2, 5, 3, 4]) == 2
  assert find_stop([2, 1, 5]) is None
  assert find_stop([]) is None


def test_power_of_two():
  assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]


def test_bad_calls_are_refused():
  with pytest.raises(ValueError, match="stop_texts needs pieces"):
    make_generate(
      NETWORK,
      num_rows=1,
      max_new_tokens=4,
      eos_id=EOS,
      pad_id=PAD,
      stop_texts=("x",),
    )
  with pytest.raises(ValueError, match="segment=0 must be 1 or more"):
    generator(segment=0)
  for options, message in (
    ({"num_slots": 0}, "num_slots=0 must be 1 or more"),
    (
      {"num_slots": 3, "mesh": make_mesh({"data": 2})},
      "num_slots=3 does not divide over 2 devices: make it 2 or 4",
    ),
    ({"cache_dtype": "int4"}, "cache_dtype='int4' is not one of"),
  ):
    with pytest.raises(ValueError, match=message):
      queued(**options)
  keys = jax.random.split(jax.random.key(1), (B, 2))
  with pytest.raises(ValueError, match=r"keys of shape \(4, 2\) for 4 prompts"):
    generator()(make_params(), keys, PROMPTS, LENGTHS, CONTROLS)
