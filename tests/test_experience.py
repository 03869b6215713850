"""D_search and D_expert against plain lists; rows against a plain loop."""

import dataclasses

import numpy as np
import pytest

from o1jax import experience as experiences
from o1jax.types import Problem, ScoredSolution

LIMITS = {
  "max_search": 4,
  "max_hindsight": 2,
  "max_demonstrations": 2,
  "max_expert_per_problem": 2,
}


def make_problem(name, data=None):
  return Problem(id=name, task="toy", prompt=f"{name} =", data=data or {})


def make_entry(name, text, reward=0.0, iteration=0, source="search", seed=0):
  rng = np.random.default_rng((seed, len(text)))
  size = len(text)
  return ScoredSolution(
    problem=make_problem(name, {"target": seed, "numbers": [1, 2.5]}),
    text=text,
    tokens=rng.integers(1, 9, size).astype(np.int32),
    step_weights=rng.uniform(size=size).astype(np.float32),
    behavior_log_probs=-rng.exponential(size=size).astype(np.float32),
    policy_log_probs=-rng.exponential(size=size).astype(np.float32),
    outcome_reward=reward,
    verdict="correct" if reward == 1 else "wrong: 7 ≠ 8",
    iteration=iteration,
    source=source,
    num_visits=seed + 1,
  )


def names(entries):
  return [(entry.problem.id, entry.text) for entry in entries]


def assert_same(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    for field in dataclasses.fields(ScoredSolution):
      x, y = getattr(a, field.name), getattr(b, field.name)
      if isinstance(y, np.ndarray):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
      else:
        assert x == y and type(x) is type(y), field.name


def test_each_pool_keeps_its_newest():
  experience = experiences.Experience(**LIMITS)
  experience.add([make_entry("p", "h", source="hindsight")])
  experience.add([make_entry("p", str(i)) for i in range(6)])
  assert names(experience.pool("search")) == [
    ("p", str(i)) for i in range(2, 6)
  ]
  assert names(experience.d_search)[-1] == ("p", "h")
  assert len(experience) == 5


def test_a_text_is_kept_once_a_pool_and_found_again_counts_as_new():
  experience = experiences.Experience(**LIMITS)
  experience.add([make_entry("p", "a"), make_entry("p", "b")])
  experience.add([make_entry("p", "a", source="hindsight")])
  experience.add([make_entry("q", "a")])
  first = make_entry("p", "a", iteration=1, seed=5)
  experience.add([first, make_entry("p", "a", iteration=1, seed=6)])
  expected = [("p", "b"), ("q", "a"), ("p", "a")]
  assert names(experience.pool("search")) == expected
  assert_same(experience.pool("search")[-1:], [first])
  assert names(experience.pool("hindsight")) == [("p", "a")]


def test_expert_holds_the_shortest_correct_of_each_problem():
  experience = experiences.Experience(**LIMITS | {"max_search": 9})
  experience.add(
    [
      make_entry("p", "long", 1.0),
      make_entry("p", "abc", 1.0),
      make_entry("p", "xyz", 1.0),
      make_entry("p", "w", 0.0),
      make_entry("p", "v", 0.5),
      make_entry("q", "solved", 1.0),
      make_entry("q", "relabelled", 1.0, source="hindsight"),
      make_entry("q", "solved", 1.0, source="demonstration"),
    ]
  )
  assert names(experience.d_expert) == [
    ("p", "abc"),
    ("p", "xyz"),
    ("q", "solved"),
    ("q", "relabelled"),
  ]
  sources = [entry.source for entry in experience.d_expert]
  assert sources == ["search"] * 3 + ["hindsight"]
  experience.add([make_entry("p", "z", 1.0)])
  assert names(experience.d_expert)[:2] == [("p", "z"), ("p", "abc")]


def test_entries_are_copies_in_the_stored_dtypes():
  experience = experiences.Experience(**LIMITS)
  entry = make_entry("p", "abc")
  entry = dataclasses.replace(entry, tokens=entry.tokens.astype(np.int64))
  experience.add([entry])
  kept = experience.pool("search")[0]
  before = kept.step_weights.copy()
  entry.step_weights[:] = 7
  np.testing.assert_array_equal(kept.step_weights, before)
  assert kept.tokens.dtype == np.int32


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"source": "found"}, "source='found' is unknown"),
    ({"step_weights": np.ones(2)}, "differ in shape"),
    ({"outcome_reward": float("nan")}, "outcome_reward=nan"),
    ({"outcome_reward": 1.5}, "outcome_reward=1.5"),
  ],
)
def test_a_bad_entry_is_refused_and_nothing_is_taken_in(change, words):
  experience = experiences.Experience(**LIMITS)
  bad = dataclasses.replace(make_entry("p", "abc"), **change)
  with pytest.raises(ValueError, match=words):
    experience.add([make_entry("p", "a"), bad])
  assert len(experience) == 0


def test_sampling_repeats_itself_and_is_even():
  experience = experiences.Experience(**LIMITS | {"max_search": 50})
  experience.add([make_entry("p", str(i)) for i in range(10)])

  def draw(seed, n):
    return names(experience.sample(np.random.default_rng(seed), n, "search"))

  assert draw(1, 7) == draw(1, 7) != draw(2, 7)
  assert all(len(set(draw(seed, 7))) == 7 for seed in range(10))
  counts = [draw(1, 23).count(("p", str(i))) for i in range(10)]
  assert sorted(counts) == [2] * 7 + [3] * 3
  shares = np.zeros(10)
  for seed in range(400):
    for _, text in draw(seed, 3):
      shares[int(text)] += 1
  # 1,200 draws, 120 each expected, standard deviation 9.2.
  assert np.all(np.abs(shares - 120) < 5 * 9.2)
  assert draw(1, 0) == []
  with pytest.raises(ValueError, match="'hindsight' is empty"):
    experience.sample(np.random.default_rng(0), 1, "hindsight")
  with pytest.raises(ValueError, match="'sarch' is unknown"):
    experience.sample(np.random.default_rng(0), 1, "sarch")


def test_arrays_hold_everything_exactly():
  limits = LIMITS | {"max_search": 9}
  experience = experiences.Experience(**limits)
  entries = [
    make_entry("p", "3 + 7 = 10 (left: 2)\n", 1.0, seed=3),
    make_entry("p", "", seed=3),
    make_entry("é 日本 \ud800", "naïve \x00 \U0001f600", 1 / 3, 2),
    make_entry("p", "undone", seed=4, source="hindsight"),
    make_entry("p", "shown", 1.0, source="demonstration"),
  ]
  experience.add(entries)
  arrays = experience.to_arrays()
  for name, array in arrays.items():
    assert isinstance(array, np.ndarray) and array.size, name
    assert array.dtype.kind in "iuf", name
  restored = experiences.Experience.from_arrays(arrays, **limits)
  for source in (*experiences.SOURCES, "expert"):
    assert_same(restored.pool(source), experience.pool(source))
  again = restored.to_arrays()
  assert set(again) == set(arrays)
  for name in arrays:
    np.testing.assert_array_equal(again[name], arrays[name])


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_arrays_of_nothing_hold_nothing(texts):
  experience = experiences.Experience(**LIMITS)
  experience.add([make_entry(f"p{i}", text) for i, text in enumerate(texts)])
  arrays = experience.to_arrays()
  assert all(array.size for array in arrays.values())
  restored = experiences.Experience.from_arrays(arrays, **LIMITS)
  assert_same(restored.pool("search"), experience.pool("search"))


def plain_rows(prompts, entries, length, kind, where, step_end_ids, pad_id):
  """The layout, a token at a time."""
  shape = (len(entries), length)
  tokens = np.full(shape, pad_id)
  weights, targets, known = np.zeros(shape), np.zeros(shape), np.zeros(shape)
  lengths = []
  for b, (prompt, entry) in enumerate(zip(prompts, entries, strict=True)):
    row = [*prompt, *entry.tokens]
    if len(row) > length:
      lengths.append(0)
      continue
    lengths.append(len(row))
    for t, token in enumerate(row):
      tokens[b, t] = token
      if t >= len(prompt):
        i = t - len(prompt)
        weights[b, t - 1] = {
          "ones": 1,
          "step_weights": entry.step_weights[i],
          "zeros": 0,
        }[kind]
      is_edge = t in (len(prompt) - 1, len(row) - 1)
      is_solution = t >= len(prompt)
      is_end = is_solution and token in step_end_ids
      if (where == "all" and (is_edge or is_solution)) or (
        where == "steps" and (is_edge or is_end)
      ):
        targets[b, t] = entry.outcome_reward
        known[b, t] = 1
  return tokens, lengths, weights, targets, known


@pytest.mark.parametrize("where", ["all", "steps", "none"])
@pytest.mark.parametrize("kind", ["ones", "step_weights", "zeros"])
def test_rows_equal_a_loop_over_tokens(kind, where):
  rng = np.random.default_rng(4)
  entries, prompts = [], []
  for i in range(20):
    entries.append(make_entry("p", "x" * (i % 9), reward=i / 20, seed=i))
    prompts.append(rng.integers(1, 9, 1 + i % 5))
  batch, num_dropped = experiences.make_learner_batch(
    prompts,
    entries,
    length=9,
    policy_weights=kind,
    value_positions=where,
    step_end_ids=(3, 5),
    pad_id=6,
  )
  expected = plain_rows(prompts, entries, 9, kind, where, (3, 5), 6)
  found = (
    batch.tokens,
    batch.lengths,
    batch.policy_weights,
    batch.value_targets,
    batch.value_weights,
  )
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert num_dropped == expected[1].count(0) > 0
  assert [a.dtype for a in found] == [np.int32] * 2 + [np.float32] * 3


def make_rows(prompts, entries, **arguments):
  return experiences.make_learner_batch(
    prompts,
    entries,
    **{"length": 6, "policy_weights": "ones", "value_positions": "all"}
    | arguments,
  )


def test_rows_that_are_all_too_long_are_empty():
  batch, num_dropped = make_rows(
    [np.ones(4, np.int32)] * 2, [make_entry("p", "abc")] * 2
  )
  assert num_dropped == 2
  assert not batch.tokens.any() and not batch.lengths.any()
  assert not batch.policy_weights.any() and not batch.value_weights.any()


def test_bad_rows_are_refused():
  entry, prompt = make_entry("p", "abc"), np.ones(2, np.int32)
  with pytest.raises(ValueError, match="prompt 1 has no tokens"):
    make_rows([prompt, prompt[:0]], [entry, entry])
  with pytest.raises(ValueError, match="2 prompts but 1 entries"):
    make_rows([prompt, prompt], [entry])
  with pytest.raises(ValueError, match="policy_weights='one' is unknown"):
    make_rows([prompt], [entry], policy_weights="one")
  with pytest.raises(ValueError, match="value_positions='step' is unknown"):
    make_rows([prompt], [entry], value_positions="step")
