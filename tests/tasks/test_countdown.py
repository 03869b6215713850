"""Countdown: splits, sampling, demonstrations, relabelling, bad input."""

import collections
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from o1jax.tasks import make_task, numbers_text, success_rate

KINDS = ("random_play", "optimal", "hindsight", "search_trace")
VARIANTS = {
  "default": {},
  "integers": {"integers_only": True},
  "four": {"num_numbers": 4, "max_number": 9},
  "targets": {"heldout": 0.0, "heldout_targets": 0.1},
  "both": {"heldout": 0.3, "heldout_targets": 0.3},
}


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sampled_problems_are_solvable_and_in_range(options, split):
  task = make_task("countdown", **options)
  problems = task.sample_problems(rng(), 60, split)
  assert len(problems) == 60
  for problem in problems:
    numbers, target = problem.data["numbers"], problem.data["target"]
    assert len(numbers) == task.num_numbers
    assert task.min_number <= min(numbers) <= max(numbers) <= task.max_number
    assert task.min_target <= target <= task.max_target
    assert task.can_reach(problem)
    assert problem.prompt == f"{' '.join(map(str, numbers))} = {target}\n"
    json.dumps(dict(problem.data))  # plain values


def test_ids_ignore_the_order_of_the_numbers():
  task = make_task("countdown")
  first = task.make_problem([3, 7, 2], 12)
  second = task.make_problem([7, 2, 3], 12)
  assert first.id == second.id == "countdown/2,3,7=12"
  assert (first.prompt, second.prompt) == ("3 7 2 = 12\n", "7 2 3 = 12\n")


def keys(problems):
  return {tuple(sorted(p.data["numbers"])) for p in problems}


def all_kinds(task, n):
  for seed, kind in enumerate(KINDS):
    yield from task.demonstrations(kind, rng(seed), n)


def test_splits_share_no_multiset_of_numbers():
  task = make_task("countdown", max_number=12)
  train = keys(task.sample_problems(rng(0), 3000))
  demonstrated = keys(problem for problem, _ in all_kinds(task, 800))
  heldout = keys(task.sample_problems(rng(1), 1000, "heldout"))
  assert not (train | demonstrated) & heldout
  # A tenth of 364 multisets: 36 expected, standard deviation 5.7.
  assert 15 < len(heldout) < 60
  assert len(train) > 250


def test_splits_share_no_target():
  task = make_task("countdown", heldout=0.0, heldout_targets=0.1)
  problems = task.sample_problems(rng(0), 2000)
  problems += [problem for problem, _ in all_kinds(task, 500)]
  train = {problem.data["target"] for problem in problems}
  heldout = task.sample_problems(rng(1), 500, "heldout")
  heldout = {problem.data["target"] for problem in heldout}
  assert not train & heldout
  assert len(heldout) == 9 and len(train | heldout) == 90


def test_with_both_criteria_heldout_means_both():
  task = make_task("countdown", heldout=0.3, heldout_targets=0.3)
  train = task.sample_problems(rng(0), 1500)
  heldout = task.sample_problems(rng(1), 1500, "heldout")
  assert not keys(train) & keys(heldout)
  targets = [{p.data["target"] for p in part} for part in (train, heldout)]
  assert not targets[0] & targets[1]


def test_the_heldout_seed_changes_the_split():
  first = keys(make_task("countdown").sample_problems(rng(), 500, "heldout"))
  task = make_task("countdown", heldout_seed=1)
  second = keys(task.sample_problems(rng(), 500, "heldout"))
  assert len(first & second) < 0.3 * len(first)


def test_heldout_problems_are_one_fixed_list():
  task = make_task("countdown")
  problems = task.heldout_problems(200)
  assert len({problem.id for problem in problems}) == 200
  again = make_task("countdown").heldout_problems(120)
  assert again == problems[:120]
  # May change only with a reason to give up comparing with earlier results.
  assert [problem.prompt for problem in problems[:3]] == GOLDEN
  with pytest.raises(ValueError, match="held-out problems"):
    make_task("countdown", max_number=3).heldout_problems(400)


GOLDEN = ["4 9 19 = 24\n", "4 5 8 = 12\n", "2 13 11 = 37\n"]


def test_sampling_repeats_with_its_seed():
  task = make_task("countdown")
  for kind in KINDS:
    first = task.demonstrations(kind, rng(5), 50)
    assert first == task.demonstrations(kind, rng(5), 50)
    assert first != task.demonstrations(kind, rng(6), 50)
  assert task.sample_problems(rng(5), 9) == task.sample_problems(rng(5), 9)


def test_targets_are_uniform_over_those_in_reach():
  task = make_task(
    "countdown", min_number=2, max_number=3, num_numbers=2, min_target=1,
    max_target=9, heldout=0.0,
  )  # fmt: skip
  problems = task.sample_problems(rng(), 3000)
  of_2_3 = [p.data["target"] for p in problems if keys([p]) == {(2, 3)}]
  counts = np.bincount(of_2_3, minlength=10)
  assert set(np.flatnonzero(counts)) == {1, 5, 6}  # 3-2, 2+3, 2*3
  expected = len(of_2_3) / 3
  sigma = math.sqrt(expected * 2 / 3)
  assert np.abs(counts[[1, 5, 6]] - expected).max() < 5 * sigma


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations(kind, options):
  task = make_task("countdown", **options)
  problems, texts = zip(*task.demonstrations(kind, rng(), 400), strict=True)
  assert len(texts) == 400
  assert all(map(all, map(task.judge_steps, problems, texts)))
  rate = success_rate(task, problems, texts)
  if kind == "random_play":
    assert rate < 0.05  # targets know nothing of the play
  else:
    assert rate == 1.0
  has_dead_ends = ["back (left: " in text for text in texts]
  if kind == "search_trace":
    assert 0.5 < np.mean(has_dead_ends) < 1.0
  else:
    assert not any(has_dead_ends)


def test_targets_of_random_play_are_independent_of_it():
  task = make_task("countdown")
  pairs = task.demonstrations("random_play", rng(), 4000)
  reached, targets = [], []
  for problem, text in pairs:
    answer = numbers_text.claimed_number(text)
    if answer.isdigit() and 10 <= int(answer) <= 99:
      reached.append(int(answer))
      targets.append(problem.data["target"])
  assert len(reached) > 500
  correlation = np.corrcoef(reached, targets)[0, 1]
  assert abs(correlation) < 5 / math.sqrt(len(reached))
  rate = np.mean(np.equal(reached, targets))
  assert rate < 1 / 90 + 5 * math.sqrt(1 / 90 / len(reached))


def test_optimal_demonstrations_cover_all_solutions():
  task = make_task(
    "countdown", min_number=2, max_number=2, num_numbers=3, min_target=6,
    max_target=6, heldout=0.0,
  )  # fmt: skip
  pairs = task.demonstrations("optimal", rng(), 300)
  texts = {text for _, text in pairs}
  solutions = set(task.solutions(pairs[0][0]))
  assert solutions <= texts
  assert any("2 + 2" in text for text in texts)
  assert any("2 * 2" in text for text in texts)


def test_a_trace_goes_on_from_where_it_went_back():
  task = make_task("countdown", num_numbers=4)
  for problem, text in task.demonstrations("search_trace", rng(), 50):
    lines = text.split("\n")
    for place, line in enumerate(lines):
      if line.startswith("back"):
        before = lines[place - 1].split("(left: ")[1].rstrip(")")
        assert " " not in before  # it went on to the end
        assert before != str(problem.data["target"])
        prefix = "\n".join(lines[: place + 1])
        assert task.can_reach(problem, prefix)


OPTIONS = {"canonical_play": True, "balanced_hindsight": True}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_with_options(kind, options):
  task = make_task("countdown", **OPTIONS, **options)
  pairs = task.demonstrations(kind, rng(), 200)
  problems, texts = zip(*pairs, strict=True)
  assert len(texts) == 200
  assert all(map(all, map(task.judge_steps, problems, texts)))
  if kind != "random_play":
    assert success_rate(task, problems, texts) == 1.0
  for problem in problems:
    assert task.is_train(problem)
  assert pairs == task.demonstrations(kind, rng(), 200)
  assert pairs != task.demonstrations(kind, rng(1), 200)


def is_canonical(line):
  a, op, b, *_ = line.split(" ")
  result = line.split(" = ")[1].split(" ")[0]
  return Fraction(a) >= Fraction(b) and Fraction(result) >= 0


@pytest.mark.parametrize("balanced", [False, True])
def test_canonical_play(balanced):
  task = make_task(
    "countdown", canonical_play=True, balanced_hindsight=balanced
  )
  full = make_task("countdown", balanced_hindsight=balanced)
  for kind in ("random_play", "hindsight"):
    for made in (task, full):
      texts = [text for _, text in made.demonstrations(kind, rng(), 300)]
      share = np.mean([is_canonical(x) for t in texts for x in t.split("\n")])
      assert share == 1.0 if made is task else share < 0.7


def test_dead_ends_are_canonical():
  task = make_task("countdown", canonical_play=True, num_numbers=4)
  pairs = task.demonstrations("search_trace", rng(), 200)
  dead, total = 0, 0
  for _, text in pairs:
    lines = text.split("\n")
    for place, line in enumerate(lines[1:]):
      if line.startswith("back"):  # what stands before it is a dead end
        total += 1
        dead += is_canonical(lines[place])
  assert dead == total > 100


def test_options_leave_problems_judgement_and_values_alone():
  plain, task = make_task("countdown"), make_task("countdown", **OPTIONS)
  for split in ("train", "heldout"):
    problems = plain.sample_problems(rng(), 20, split)
    assert task.sample_problems(rng(), 20, split) == problems
    for problem in problems:
      assert task.true_value(problem) == plain.true_value(problem)
      assert task.solutions(problem) == plain.solutions(problem)
  optimal = plain.demonstrations("optimal", rng(), 20)
  assert task.demonstrations("optimal", rng(), 20) == optimal
  problem = task.make_problem([3, 7, 2], 6)
  text = "3 - 7 = -4 (left: 2 -4)\n2 - -4 = 6 (left: 6)"
  assert task.check(problem, text).is_correct
  assert task.judge_steps(problem, text) == [True, True]


def test_balanced_hindsight_shows_each_target_of_a_row_once():
  task = make_task("countdown", balanced_hindsight=True)
  pairs = task.demonstrations("hindsight", rng(), 200)
  rows = [tuple(problem.data["numbers"]) for problem, _ in pairs]
  targets = [problem.data["target"] for problem, _ in pairs]
  assert len(set(zip(rows, targets, strict=True))) == len(pairs)
  groups = [list(group) for _, group in itertools.groupby(rows)]
  assert len(groups) == len(set(rows)) > 20  # one row after another
  # 64 random plays find most of what all reach; the last row is cut.
  shares = [
    len(group)
    / sum(
      task.can_reach(task.make_problem(list(group[0]), target))
      for target in range(10, 100)
    )
    for group in groups[:-1]
  ]
  assert max(shares) <= 1.0 and 0.65 < np.mean(shares) < 0.8


def test_balanced_hindsight_favours_no_target():
  options = dict(
    num_numbers=2, min_number=2, max_number=4, min_target=2, max_target=8,
    heldout=0.0,
  )  # fmt: skip
  counts = {}
  for balanced in (False, True):
    task = make_task("countdown", balanced_hindsight=balanced, **options)
    pairs = task.demonstrations("hindsight", rng(), 3000)
    counts[balanced] = collections.Counter(
      problem.data["target"]
      for problem, _ in pairs
      if sorted(problem.data["numbers"]) == [2, 4]
    )
  assert set(counts[True]) == {2, 6, 8}
  # 4 - 2 and 4 / 2 both make 2: two of its plays to one of each other.
  plain = counts[False]
  assert plain[2] / plain.total() == pytest.approx(0.5, abs=0.06)
  assert max(counts[True].values()) - min(counts[True].values()) <= 1
  # Both plays that make 2 are shown.
  task = make_task("countdown", balanced_hindsight=True, **options)
  ops = collections.Counter(
    text.split(" ")[1]
    for problem, text in task.demonstrations("hindsight", rng(1), 3000)
    if sorted(problem.data["numbers"]) == [2, 4] and problem.data["target"] == 2
  )
  assert set(ops) == set("-/")
  assert abs(ops["-"] / ops.total() - 0.5) < 5 * 0.5 / math.sqrt(ops.total())


def test_the_first_of_balanced_hindsight_is_any_target():
  task = make_task(
    "countdown", num_numbers=2, min_number=2, max_number=4, min_target=2,
    max_target=8, heldout=0.0, balanced_hindsight=True,
  )  # fmt: skip
  firsts = [
    task.demonstrations("hindsight", rng(seed), 1)[0][0] for seed in range(900)
  ]
  targets = [
    problem.data["target"]
    for problem in firsts
    if sorted(problem.data["numbers"]) == [2, 4]
  ]
  share = np.mean(np.equal(targets, 2))
  assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / len(targets))


FAILED = "3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)"


def test_relabel():
  task = make_task("countdown", heldout=0.0)
  problem = task.make_problem([3, 7, 2], 13)
  other = task.relabel(problem, FAILED)
  assert other == task.make_problem([3, 7, 2], 12)
  assert task.check(other, FAILED).is_correct
  assert task.relabel(other, FAILED) is None  # it is right already
  assert task.relabel(problem, "3 + 7 + 2") == other
  trace = "3 - 7 = -4 (left: 2 -4)\nback (left: 3 7 2)\n" + FAILED
  assert task.relabel(problem, trace) == other


@pytest.mark.parametrize(
  "text",
  [
    "",
    "3 + 7 = 10 (left: 2 10)",
    "3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)",
    "3 + 7 = 11 (left: 2 11)\n11 + 5 = 16 (left: 16)",
    "7 - 3 = 4 (left: 2 4)\n4 + 2 = 6 (left: 6)",  # below the range
    "3 - 7 = -4 (left: 2 -4)\n2 * -4 = -8 (left: -8)",
    "3 / 7 = 3/7 (left: 2 3/7)\n3/7 + 2 = 17/7 (left: 17/7)",
    FAILED + "\nso 12",
    # 12 was reached before: the text goes on after the answer.
    FAILED + "\nback (left: 3 7 2)\n" + FAILED,
  ],
)
def test_relabel_refuses(text):
  task = make_task("countdown", heldout=0.0)
  assert task.relabel(task.make_problem([3, 7, 2], 13), text) is None


VARIANTS_HELDOUT = [{"heldout": 0.3}, {"heldout": 0.0, "heldout_targets": 0.3}]


@pytest.mark.parametrize("options", VARIANTS_HELDOUT)
def test_relabel_never_gives_a_heldout_problem(options):
  task = make_task("countdown", **options)
  for split in ("train", "heldout"):
    for problem in task.sample_problems(rng(), 40, split):
      asked = task.make_problem(problem.data["numbers"], 1000)
      found = task.relabel(asked, task.solutions(problem)[0])
      assert found == (problem if split == "train" else None)


def test_true_value_of_prefixes():
  task = make_task("countdown")
  problem = task.make_problem([3, 7, 2], 12)
  first = FAILED.split("\n")[0]
  assert task.true_value(problem, FAILED) == 1.0
  assert task.true_value(problem, first) == pytest.approx(1 / 6)
  assert 0 < task.true_value(problem) < 1 / 6
  assert task.true_value(problem, first.replace("10", "11")) == 0.0
  assert task.can_reach(problem, first)
  assert not task.can_reach(problem, "3 / 7 = 3/7 (left: 2 3/7)")
  assert not task.can_reach(problem, "3 + 7 = 11 (left: 2 11)")


def test_judge_steps():
  task = make_task("countdown")
  problem = task.make_problem([3, 7, 2], 13)
  assert task.judge_steps(problem, FAILED) == [True, True]
  assert task.judge_steps(problem, "") == []
  wrong = "3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)"
  assert task.judge_steps(problem, wrong) == [False, True]


def test_parse():
  task = make_task("countdown")
  problem = task.make_problem([3, 7, 2], 13)
  assert task.parse("3 7 2 = 13") == problem
  assert task.parse(" 3, 7,2=13\n") == problem
  assert task.parse("3 4 = 12").data["numbers"] == [3, 4]
  assert task.parse("500 600 = 1100").data["target"] == 1100


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "not a countdown problem"),
    ("3 7 2", "not a countdown problem"),
    ("3 7 x = 13", "not a countdown problem"),
    ("3 7 2 = 13 = 13", "not a countdown problem"),
    ("3 7 2 = -13", "not a countdown problem"),
    ("3 = 3", "countdown takes 2 to 5"),
    ("1 2 3 4 5 6 = 7", "countdown takes 2 to 5"),
    ("1234567 1 = 1234568", "more than 6 digits"),
    ("3 7 2 = 9999", "no solution: 3 7 2 = 9999"),
  ],
)
def test_parse_refuses(text, message):
  with pytest.raises(ValueError, match=message):
    make_task("countdown").parse(text)


def test_parse_obeys_the_rule_in_force():
  assert make_task("countdown").parse("4 6 2 = 3")
  assert make_task("countdown").parse("1 5 5 5 = 24")
  with pytest.raises(ValueError, match="no solution"):
    make_task("countdown", integers_only=True).parse("1 5 5 5 = 24")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_numbers": 1}, "num_numbers=1 is not in 2 to 5"),
    ({"num_numbers": 6}, "num_numbers=6 is not in 2 to 5"),
    ({"min_number": 5, "max_number": 4}, "min_number=5, max_number=4"),
    ({"min_number": -1}, "min_number=-1"),
    ({"min_target": 50, "max_target": 40}, "min_target=50"),
    ({"max_target": 10**6}, "narrow the range"),
    ({"heldout": 1.0}, "heldout=1.0 is not in"),
    ({"heldout_targets": -0.1}, "heldout_targets=-0.1 is not in"),
    ({"num_numbers": 5, "max_number": 5000}, "64 bits"),
  ],
)
def test_refuses_options(options, message):
  with pytest.raises(ValueError, match=message):
    make_task("countdown", **options)


def test_refuses_what_cannot_be_drawn():
  with pytest.raises(ValueError, match="nothing is held out"):
    make_task("countdown", heldout=0.0).heldout_problems(1)
  task = make_task("countdown", max_number=2, min_target=90)
  with pytest.raises(ValueError, match="nothing solvable"):
    task.sample_problems(rng(), 1)
  with pytest.raises(ValueError, match="did you mean 'heldout'"):
    make_task("countdown").sample_problems(rng(), 1, "held-out")
  with pytest.raises(ValueError, match="did you mean 'optimal'"):
    make_task("countdown").demonstrations("optimum", rng(), 1)


def test_nothing_asked_nothing_given():
  task = make_task("countdown")
  assert task.sample_problems(rng(), 0) == []
  for kind in KINDS:
    assert task.demonstrations(kind, rng(), 0) == []


def test_corpus_holds_the_words_of_all_texts():
  task = make_task("countdown")
  texts = task.corpus(rng(), 200)
  assert len(texts) == 200
  assert all(" = " in text and "(left: " in text for text in texts)
  assert 5 < sum("back" in text for text in texts) < 30
  assert not any("back" in t for t in task.corpus(rng(), 50, "optimal"))


def problems_of(task, path):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [task.make_problem(row["nums"], row["target"]) for row in rows]


@pytest.mark.parametrize(
  "name, count", [("cd3_dev", 126), ("tinyzero_dev", 984)]
)
def test_public_problems_are_solvable(test_data, name, count):
  task = make_task("countdown")
  problems = problems_of(task, test_data / "countdown" / f"{name}.jsonl")
  assert len(problems) == count
  assert all(map(task.can_reach, problems))


@pytest.mark.slow
def test_public_training_problems_are_solvable(test_data):
  task = make_task("countdown")
  path = test_data / "countdown" / "tinyzero_train.jsonl"
  problems = problems_of(task, path)
  assert len(problems) == 7981
  assert all(map(task.can_reach, problems))
