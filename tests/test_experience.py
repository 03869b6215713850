"""D_search and D_expert against plain lists; rows against a plain loop."""

import dataclasses
import itertools

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


def test_the_even_draw_is_what_it_always_was():
  experience = experiences.Experience(**LIMITS | {"max_search": 50})
  experience.add([make_entry("p", str(i)) for i in range(10)])
  drawn = experience.sample(np.random.default_rng(3), 13, "search")
  # Recorded: a resumed run of an older version draws the same rows.
  assert "".join(entry.text for entry in drawn) == "9602147538543"


def test_rates_of_success_are_those_of_the_search_alone():
  experience = experiences.Experience(**LIMITS | {"max_search": 9})
  assert experience.success_rates() == []
  found = [("p", "a", 1.0), ("q", "b", 0.5), ("p", "c", 0.0), ("q", "d", 1.0)]
  experience.add([make_entry(*one) for one in found])
  experience.add([make_entry("p", "e", 1.0, source="hindsight")])
  rates = [(one.id, rate) for one, rate in experience.success_rates()]
  assert rates == [("p", 1 / 2), ("q", 1 / 2)]
  # What is added counts, and a text that is found again counts once.
  experience.add([make_entry("p", "f"), make_entry("r", "g", 1.0)])
  experience.add([make_entry("p", "f", iteration=1)])
  rates = {one.id: rate for one, rate in experience.success_rates()}
  assert rates == {"p": 1 / 3, "q": 1 / 2, "r": 1}


def aged_experience():
  """Problem p solved once in four, q once in one; ages 3, 2, 1, 0 and 0."""
  experience = experiences.Experience(**LIMITS | {"max_search": 9})
  experience.add(
    [make_entry("p", str(i), float(i == 3), iteration=4 + i) for i in range(4)]
  )
  experience.add(
    [
      make_entry("q", "x", 1.0, iteration=7),
      make_entry("q", "y", 1.0, iteration=2, source="hindsight"),
      make_entry("r", "z", 1.0, iteration=7, source="hindsight"),
    ]
  )
  return experience


def weights_of(experience, pool="search", **options):
  entries, shares, num_stale = experience.weighted(pool, **options)
  assert len(entries) == len(shares) and not num_stale
  np.testing.assert_allclose(shares.sum(), 1)
  return dict(zip(names(entries), shares / shares.max(), strict=True))


def test_weights_are_products_of_age_and_priority():
  experience = aged_experience()
  keys = [("p", "0"), ("p", "1"), ("p", "2"), ("p", "3"), ("q", "x")]
  aged = 2 ** (-np.array([3, 2, 1, 0, 0]) / 1.5)
  # p: (1 + 1) / (4 + 2); q: (1 + 1) / (1 + 2).
  difficulty = np.array([8 / 9] * 5)
  advantage = np.array([1 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 3])
  for options, expected in (
    ({}, np.ones(5)),
    ({"recency": 1.5}, aged),
    ({"priority": "difficulty"}, difficulty),
    ({"priority": "advantage"}, advantage),
    ({"priority": "advantage", "recency": 1.5}, advantage * aged),
  ):
    found = weights_of(experience, **options)
    assert list(found) == keys
    np.testing.assert_allclose(
      list(found.values()), expected / expected.max(), err_msg=str(options)
    )


def test_priorities_know_success_from_search_alone():
  # Relabelled solutions are right by making: they say nothing of difficulty.
  found = weights_of(aged_experience(), "hindsight", priority="difficulty")
  np.testing.assert_allclose(found["q", "y"], 8 / 9)
  assert found["r", "z"] == 1  # Never searched: one half.
  experience = aged_experience()
  experience.sample(np.random.default_rng(0), 1, "search", priority="advantage")
  experience.add([make_entry("q", "w", 0.0, iteration=7)])
  found = weights_of(experience, priority="difficulty")
  np.testing.assert_allclose(found["q", "x"] / found["p", "0"], 9 / 8)


def test_old_entries_are_left_out_and_counted():
  experience = aged_experience()

  def kept(**options):
    entries, shares, num_stale = experience.weighted("search", **options)
    np.testing.assert_allclose(shares, 1 / len(entries))
    return "".join(e.text for e in entries), num_stale

  assert experience.newest_iteration == 7
  assert kept() == ("0123x", 0)
  assert kept(max_age=1) == ("23x", 2)
  assert kept(max_age=0) == ("3x", 3)
  assert kept(max_age=2, iteration=8) == ("23x", 2)
  # Entries of a later iteration are not older than the present.
  assert kept(max_age=0, iteration=5) == ("123x", 1)
  rng = np.random.default_rng(0)
  drawn = experience.sample(rng, 9, "search", max_age=1)
  assert {entry.text for entry in drawn} == set("23x") and len(drawn) == 9
  with pytest.raises(ValueError, match="has 5 entries, all older than max_age"):
    experience.sample(rng, 3, "search", max_age=1, iteration=20)
  with pytest.raises(ValueError, match="'demonstration' is empty: nothing"):
    experience.sample(rng, 3, "demonstration", max_age=1)
  # However old a pool is as a whole, its youngest lead.
  _, shares, _ = experience.weighted("search", recency=0.5, iteration=10**6)
  assert shares[-1] == shares[-2] > 0.4


@pytest.mark.parametrize("n", [2, 7])
def test_draws_by_weight_have_the_expected_frequencies(n):
  experience = aged_experience()
  options = {"recency": 1.5, "priority": "advantage"}
  entries, shares, _ = experience.weighted("search", **options)
  index = {key: i for i, key in enumerate(names(entries))}
  counts, num_draws = np.zeros((2000, 5)), 2000
  firsts = np.zeros(5)
  for seed in range(num_draws):
    rng = np.random.default_rng(seed)
    drawn = names(experience.sample(rng, n, "search", **options))
    assert len(drawn) == n
    firsts[index[drawn[0]]] += 1
    for key in drawn:
      counts[seed, index[key]] += 1
  expected = n * shares
  assert np.all(np.abs(counts - expected) < 1)
  error = 5 * np.sqrt(expected * 1.0 / num_draws)
  assert np.all(np.abs(counts.mean(axis=0) - expected) < error)
  # The order is random too: any entry may come first, by its share.
  error = 5 * np.sqrt(shares / num_draws)
  assert np.all(np.abs(firsts / num_draws - shares) < error)
  if n == 2:
    # Any two may come together, whatever their places in the pool.
    together = {tuple(np.flatnonzero(row).tolist()) for row in counts}
    assert together >= set(itertools.combinations(range(5), 2))
  again = experience.sample(np.random.default_rng(1), n, "search", **options)
  drawn = experience.sample(np.random.default_rng(1), n, "search", **options)
  assert names(again) == names(drawn)
  rng = np.random.default_rng(0)
  assert experience.sample(rng, 0, "search", **options) == []


@pytest.mark.parametrize(
  "options, message",
  [
    ({"recency": 0}, "recency=0 must be a number of iterations above 0"),
    ({"recency": float("nan")}, "recency=nan"),
    ({"max_age": -1}, "max_age=-1 must be 0 or more"),
    ({"priority": "hard"}, "priority='hard' is unknown; take one of none"),
  ],
)
def test_bad_weights_are_refused(options, message):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match=message):
    aged_experience().sample(rng, 1, "search", **options)


def grouped_entries():
  return [
    make_entry("p", "a", 1.0, iteration=3),
    make_entry("q", "b", 0.0, iteration=3),
    make_entry("p", "c", 0.0, iteration=3),
    make_entry("p", "d", 0.0, iteration=2),
    make_entry("q", "e", 0.0, iteration=3),
    make_entry("r", "f", 1.0, iteration=3),
    make_entry("p", "g", 0.0, iteration=3),
    make_entry("s", "h", 1.0, iteration=3),
    make_entry("s", "i", 1.0, iteration=3),
  ]


def texts_of(groups):
  return ["".join(entry.text for entry in group) for group in groups]


def test_groups_are_of_one_problem_and_one_iteration():
  experience = experiences.Experience(**LIMITS | {"max_search": 20})
  experience.add(grouped_entries())
  groups, counts = experience.groups("search", 3)
  assert texts_of(groups) == ["acg", "be", "hi"]
  assert counts == {"groups": 3, "solutions": 7, "small": 1, "alike": 2}
  groups, counts = experience.groups("search", 3, skip_alike=True)
  assert texts_of(groups) == ["acg"]
  assert counts == {"groups": 1, "solutions": 3, "small": 1, "alike": 2}
  groups, counts = experience.groups("search", 3, min_size=1)
  assert texts_of(groups) == ["acg", "be", "f", "hi"]
  assert counts == {"groups": 4, "solutions": 8, "small": 0, "alike": 3}
  groups, counts = experience.groups("search", 9)
  assert groups == [] and set(counts.values()) == {0}
  with pytest.raises(ValueError, match="min_size=0 must be at least 1"):
    experience.groups("search", 3, min_size=0)


def test_groups_of_a_list_keep_what_was_drawn_twice():
  a, b = make_entry("p", "a", 1.0), make_entry("p", "b")
  groups, counts = experiences.group_solutions([a, b, a])
  assert texts_of(groups) == ["aba"] and counts["solutions"] == 3


def test_pairs_prefer_the_better_of_the_same_problem():
  experience = experiences.Experience(**LIMITS | {"max_search": 20})
  experience.add([*grouped_entries(), make_entry("p", "j", 0.5, iteration=3)])
  rng = np.random.default_rng(0)
  pairs, counts = experience.pairs(rng, max_per_problem=99)
  assert sorted(texts_of(pairs)) == ["ac", "ad", "ag", "aj", "jc", "jd", "jg"]
  for better, worse in pairs:
    assert better.problem.id == worse.problem.id == "p"
  assert counts == {
    "pairs": 7,
    "problems": 4,
    "all_right": 2,
    "all_wrong": 1,
    "stale": 0,
  }
  pairs, _ = experience.pairs(rng, max_per_problem=99, min_gap=0.5)
  assert sorted(texts_of(pairs)) == ["ac", "ad", "ag"]
  # A problem that is partly right and has no pair is not all right.
  _, counts = experience.pairs(rng, min_gap=0.99)
  assert (counts["all_right"], counts["all_wrong"]) == (2, 1)
  experience.add([make_entry("t", "k", 1.0), make_entry("t", "l", 0.5)])
  _, counts = experience.pairs(rng, min_gap=0.5)
  assert (counts["all_right"], counts["all_wrong"]) == (2, 2)
  pairs, counts = experience.pairs(rng, max_per_problem=99, max_age=0)
  assert sorted(texts_of(pairs)) == ["ac", "ag", "aj", "jc", "jg"]
  assert counts["stale"] == 3
  pairs, counts = experience.pairs(rng, max_age=1, iteration=9)
  assert pairs == [] and counts["stale"] == 12 and counts["problems"] == 0


def test_pairs_are_drawn_evenly_and_repeat_themselves():
  experience = experiences.Experience(**LIMITS | {"max_search": 20})
  experience.add([make_entry("q", str(i), float(i < 2)) for i in range(5)])
  experience.add([make_entry("p", str(i), float(i < 1)) for i in range(3)])
  counts = {}
  for seed in range(600):
    rng = np.random.default_rng(seed)
    pairs, _ = experience.pairs(rng, max_per_problem=2)
    again, _ = experience.pairs(np.random.default_rng(seed), max_per_problem=2)
    assert texts_of(pairs) == texts_of(again)
    assert [pair[0].problem.id for pair in pairs] == list("qqpp")
    assert len(set(texts_of(pairs[:2]))) == 2
    for text in texts_of(pairs[:2]):
      counts[text] = counts.get(text, 0) + 1
  # 1,200 draws of 6 pairs: 200 each, standard deviation below 12.
  assert len(counts) == 6
  assert all(abs(count - 200) < 60 for count in counts.values())
  with pytest.raises(ValueError, match="max_per_problem=0 must be"):
    experience.pairs(rng, max_per_problem=0)
  with pytest.raises(ValueError, match=r"min_gap=1 is not in \[0, 1\)"):
    experience.pairs(rng, min_gap=1)


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
