"""Studies: cells kept by content, tables by hand, one compilation a search."""

import dataclasses
import functools
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags

from o1jax import config as config_lib
from o1jax import load, studies, study
from o1jax import mesh as mesh_lib
from o1jax.evaluation import bootstrap_interval
from o1jax.legal_play import make_choices, play_text
from o1jax.searched import FoundSolution, Searched
from o1jax.solver import Solver
from o1jax.studies import context as context_lib
from o1jax.studies import guidance, legal_play, runner, search
from o1jax.studies.context import Context, TaskContext
from o1jax.studies.study import Measured, Study, markdown_table
from o1jax.tasks import make_task
from o1jax.types import Problem, Verdict
from policies import (
  ROOT,
  ToyTask,
  tiny_config,
  tiny_params,
  tiny_policy,
  tiny_workdir,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

PROBLEMS = 6
# The same wherever solutions are sampled, so that they are compiled once.
NUM_SOLUTIONS = search.NUM_MEASURED


# Cells kept by content.


def toy_study(log, stops_at=None, version="1"):
  """A study without a policy: results are functions of the cell."""

  def measure(context, cell):
    if len(log) == stops_at:
      raise KeyboardInterrupt
    log.append((cell["strategy"], cell["seed"]))
    rng = np.random.default_rng([len(cell["strategy"]), cell["seed"]])
    return {"right": rng.random(5) < 0.5, "seconds": rng.random()}

  def check(context, cell):
    if cell["strategy"] == context.refused:
      raise ValueError(f"{cell['strategy']} is refused")

  def make_table(measured):
    rows = [
      (str(cell["strategy"]), str(cell["seed"]), repr(result))
      for cell, result in measured
    ]
    return markdown_table(("strategy", "seed", "result"), rows)

  return Study(
    name="toy",
    version=version,
    make_cells=lambda context, num_seeds: [
      {"strategy": name, "effort": effort, "seed": seed}
      for seed in range(num_seeds)
      for name, effort in (("greedy", 1), ("mcts", 4), ("best_of_n", 4))
    ],
    check=check,
    measure=measure,
    make_table=make_table,
    draw=lambda measured: None,
  )


class ToyContext:
  """A policy and problems, by name alone."""

  def __init__(self, policy="p", problems="q", refused=""):
    self.names = {"policy": policy, "problems": problems}
    self.refused = refused

  def identity(self):
    return self.names


def table_of(toy, folder, context=None, num_seeds=2, **options):
  """Runs a toy study; its table and how many cells have no result."""
  measured, num_missing = runner.run(
    toy, context or ToyContext(), folder, num_seeds=num_seeds, **options
  )
  return runner.show(toy, measured, folder, "Toy."), num_missing


def test_a_killed_study_goes_on_and_ends_with_the_same_table(tmp_path):
  log = []
  whole, num_missing = table_of(toy_study(log), tmp_path / "whole")
  assert len(log) == 6 and num_missing == 0
  log = []
  with pytest.raises(KeyboardInterrupt):
    table_of(toy_study(log, stops_at=4), tmp_path / "killed")
  assert len(log) == 4
  resumed, _ = table_of(toy_study(log), tmp_path / "killed")
  assert len(log) == len(set(log)) == 6
  assert resumed == whole
  # Nothing is left to measure.
  again, _ = table_of(toy_study([], stops_at=0), tmp_path / "killed")
  assert again == whole
  assert (tmp_path / "killed" / "table.md").read_text() == whole
  # More seeds are measured beside those that are there.
  table_of(toy_study(log), tmp_path / "killed", num_seeds=3)
  assert len(log) == 9 and {seed for _, seed in log[6:]} == {2}


@pytest.mark.parametrize(
  "changed", [dict(policy="other"), dict(problems="other"), dict(version="2")]
)
def test_what_results_depend_on_is_part_of_their_key(tmp_path, changed):
  log = []
  before, _ = table_of(toy_study(log), tmp_path)
  version = changed.pop("version", "1")
  table_of(toy_study(log, version=version), tmp_path, ToyContext(**changed))
  assert len(log) == 12
  # The old results stay.
  assert table_of(toy_study([], stops_at=0), tmp_path)[0] == before


def test_damaged_and_foreign_results_are_measured_anew(tmp_path, capsys):
  log = []
  whole, _ = table_of(toy_study(log), tmp_path)
  paths = sorted(tmp_path.glob("*.json"))
  assert len(paths) == 6
  content = paths[0].read_text()
  paths[0].write_text(content[: len(content) // 2])
  # One digit of a result; still JSON.
  record = json.loads(paths[1].read_text())
  record["result"]["seconds"] += 1
  paths[1].write_text(json.dumps(record))
  shutil.copy(paths[3], paths[2])
  paths[4].write_text("[]")
  (tmp_path / "notes.json").write_text("mine")
  del log[:]
  assert table_of(toy_study(log), tmp_path)[0] == whole
  assert len(log) == 4
  error = capsys.readouterr().err
  assert error.count("is damaged: it counts as not measured") == 4
  assert all(path.name in error for path in (*paths[:3], paths[4]))
  assert (tmp_path / "notes.json").read_text() == "mine"


def test_some_cells_can_be_measured_first(tmp_path):
  log = []
  _, num_missing = table_of(
    toy_study(log), tmp_path, only=["strategy=mcts", "seed=1"]
  )
  assert log == [("mcts", 1)] and num_missing == 5
  table, num_missing = table_of(
    toy_study(log), tmp_path, only=["effort=4"], max_cells=2
  )
  assert log[1:] == [("mcts", 0), ("best_of_n", 0)] and num_missing == 3
  # What was measured before is shown as well.
  assert table.count("right") == 3
  table_of(
    toy_study(log), tmp_path, only=["strategy=greedy", "strategy=best_of_n"]
  )
  assert log[3:] == [("greedy", 0), ("greedy", 1), ("best_of_n", 1)]


@pytest.mark.parametrize(
  "text, words",
  [
    ("strategy=mtcs", "unknown strategy 'mtcs': did you mean 'mcts'?"),
    ("stratgy=mcts", "unknown setting 'stratgy': did you mean 'strategy'?"),
    ("seed=7", "unknown seed '7': known: 0, 1"),
    ("mcts", "unknown setting 'mcts'"),
  ],
)
def test_what_no_cell_has_is_refused_with_the_nearest(tmp_path, text, words):
  with pytest.raises(ValueError) as error:
    table_of(toy_study([]), tmp_path, only=["effort=4", text])
  assert words in str(error.value) and "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_every_cell_is_checked_before_the_first_is_measured(tmp_path):
  log, context = [], ToyContext(refused="best_of_n")
  with pytest.raises(ValueError, match="best_of_n is refused"):
    table_of(toy_study(log), tmp_path, context)
  assert not log
  # It is not asked for.
  table_of(toy_study(log), tmp_path, context, only=["strategy=mcts"])
  assert len(log) == 2


# The study of strategies.


@pytest.fixture(scope="module")
def trained():
  return load.Trained(
    config=tiny_config(),
    task=ToyTask(num_numbers=3, min_number=1, max_number=9),
    policy=tiny_policy(),
    params=mesh_lib.replicate(tiny_params(), mesh_lib.make_mesh({})),
    mesh=mesh_lib.make_mesh({}),
    iteration=3,
  )


@pytest.fixture(scope="module")
def toy_context(trained):
  return Context(trained, trained.task.heldout_problems(PROBLEMS))


@pytest.fixture
def small(monkeypatch):
  """One budget, that of the solutions that measure it; two seeds."""
  monkeypatch.setattr(search, "EFFORTS", (NUM_SOLUTIONS,))
  return dict(num_seeds=2)


def test_the_grid_holds_every_strategy_at_every_budget(toy_context):
  cells = search.make_cells(toy_context, 2)
  assert all(json.loads(json.dumps(cell)) == cell for cell in cells)
  texts = [json.dumps(cell, sort_keys=True) for cell in cells]
  assert len(set(texts)) == len(texts)
  counts = {name: 0 for name in search.VARIANTS}
  for cell in cells:
    counts[cell["name"]] += 1
    if cell["effort"] == 8 and cell["seed"] == 0:
      search.check(toy_context, cell)
  rewarded = len(search.EFFORTS) * len(search.REWARDS) * 2
  expected = dict.fromkeys(search.VARIANTS, rewarded)
  expected |= {"greedy": 1, "majority_vote": len(search.EFFORTS) * 2}
  # The policy was not taught to revise.
  expected |= {"revision": 0, "revision_by_checker": 0, "mctsr": 0}
  words = "Left out: revision, revision_by_checker, mctsr;"
  assert search.note(toy_context).startswith(words)
  assert counts == expected
  assert len(search.EFFORTS) == 4
  efforts = {c["num_candidates"] for c in cells if c["name"] == "best_of_n"}
  assert efforts == set(search.EFFORTS)


def test_a_policy_that_was_taught_revising_is_compared_by_it(trained):
  config = tiny_config()
  with config.unlocked():
    config.learn.rows.revising = 2
  taught = dataclasses.replace(trained, config=config)
  context = Context(taught, trained.task.heldout_problems(1))
  assert search.note(context) == ""
  cells = search.make_cells(context, 1)
  assert {cell["name"] for cell in cells} == search.VARIANTS.keys()
  told = [cell for cell in cells if cell["name"] == "revision_by_checker"]
  assert [cell["effort"] for cell in told] == list(search.EFFORTS)
  assert {cell["reward"] for cell in told} == {"checker"}
  context.tokens_per_solution = lambda count: 20.0
  for cell in cells:
    if cell["name"] in ("revision", "revision_by_checker", "mctsr"):
      search.check(context, cell)


def test_a_budget_is_the_tokens_of_so_many_solutions(trained, toy_context):
  solver = Solver(
    trained.policy,
    strategy="best_of_n",
    num_candidates=NUM_SOLUTIONS,
    batch_size=4,
    mesh=trained.mesh,
    task=trained.task,
  )
  problems = list(toy_context.problems)
  searches = solver(trained.params, jax.random.key(0), problems)
  lengths = [len(s.tokens) for one in searches for s in one.solutions]
  assert len(lengths) == PROBLEMS * NUM_SOLUTIONS
  mean = np.mean(lengths)
  assert toy_context.tokens_per_solution(NUM_SOLUTIONS) == pytest.approx(mean)
  cells = {
    cell["name"]: cell
    for cell in search.make_cells(toy_context, 1)
    if cell["effort"] in (1, 8)
  }
  options = {
    name: search._options(toy_context, cell) for name, cell in cells.items()
  }
  for name in ("greedy", "majority_vote", "best_of_n"):
    assert "options" not in options[name]
  budgets = {
    name: each["options"]["max_tokens"]
    for name, each in options.items()
    if "options" in each
  }
  assert set(budgets.values()) == {math.ceil(8 * mean)}
  assert len(budgets) == len(options) - 3
  # It is no part of a cell, whose key is made before anything compiles.
  assert "max_tokens" not in json.dumps(list(cells.values()))
  found = search.measure(toy_context, cells["best_first"])
  assert found["budget_tokens"] == math.ceil(8 * mean)
  most = max(found["generated_tokens"])
  step = trained.policy.lengths.step_tokens
  assert found["budget_tokens"] - step < most <= found["budget_tokens"]


def test_a_search_is_compiled_once_for_all_seeds(trained, small, tmp_path):
  made, calls = [], []

  class Counted(Solver):
    def __init__(self, policy, **options):
      made.append(options)
      super().__init__(policy, **options)

    def __call__(self, params, key, problems, **options):
      calls.append((self, len(problems)))
      return super().__call__(params, key, problems, **options)

  folder = tmp_path / "study"
  context = Context(trained, trained.task.heldout_problems(PROBLEMS))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(context_lib, "Solver", Counted)
    table = study.run(
      search.STUDY,
      context,
      folder,
      only=["name=best_of_n", "name=greedy"],
      **small,
    )
  # Greedy; best-of-N with either reward, of which one measures the budget.
  sizes = [[n for s, n in calls if s is one] for one in {s for s, _ in calls}]
  assert sorted(sizes) == [[1, 6], [1, 6, 6], [1, 6, 6]]
  # Four problems at a time, as the config says; never more than are needed.
  assert {options["batch_size"] for options in made} == {4}
  # Majority vote, and the trees with either reward, with two seeds.
  num_left = 2 + 4 * (len(search.VARIANTS) - 6)
  assert f"{num_left} cells are not measured yet" in table
  svg = (folder / "figure.svg").read_text()
  assert "the learned value as reward" in svg and "best of n" in svg
  again = study.run(
    dataclasses.replace(search.STUDY, measure=None),
    context,
    folder,
    max_cells=1,
    only=["name=best_of_n"],
    **small,
  )
  assert again == table == (folder / "table.md").read_text()


def test_only_the_last_search_is_kept(trained):
  context = Context(trained, trained.task.heldout_problems(PROBLEMS))
  options = {"strategy": "best_of_n", "reward": "value", "num_candidates": 2}
  first = weakref.ref(context.solver(options))
  assert context.solver(dict(options)) is first()
  context.solver({**options, "num_candidates": 3})
  gc.collect()
  assert first() is None


@pytest.mark.parametrize("reward", search.REWARDS)
def test_a_cell_measures_what_the_search_answers(trained, toy_context, reward):
  cell = {"name": "any", "effort": 2, "seed": 5, "reward": reward}
  size = {"strategy": "best_of_n", "num_candidates": NUM_SOLUTIONS}
  cell |= {**size, "temperature": 1.0}
  found = search.measure(toy_context, cell)
  solver = Solver(
    trained.policy,
    **size,
    reward=reward,
    batch_size=4,
    mesh=trained.mesh,
    task=trained.task,
  )
  searches = solver(
    trained.params, jax.random.key(5), list(toy_context.problems)
  )
  selected, covered = [], []
  for one in searches:
    right = [
      s.is_finished and trained.task.check(one.problem, s.text).is_correct
      for s in one.solutions
    ]
    selected.append(one.selected is not None and right[one.selected])
    covered.append(any(right))
  assert found["selected"] == selected and found["covered"] == covered
  # The checker tells which one is right, a value may be wrong.
  assert (selected == covered) == (reward == "checker")
  assert 0 < sum(selected)
  for name in ("generated_tokens", "verifier_requests", "verifier_distinct"):
    assert found[name] == [one.cost[name] for one in searches]
  assert found["seconds"] > 0


def measured_cell(name, reward, seed, selected, effort=4):
  cell = {"name": name, "effort": effort, "seed": seed}
  if reward:
    cell["reward"] = reward
  ones = [1.0] * len(selected)
  costs = dict(generated_tokens=[4 + seed] * len(selected))
  return Measured(
    cell,
    dict(
      selected=selected,
      covered=ones,
      seconds=1.0 + seed,
      budget_tokens=5,
      verifier_requests=ones,
      verifier_distinct=ones,
      **costs,
    ),
  )


def test_rows_pool_seeds_by_problem_and_compare_with_best_of_n():
  right, wrong = True, False
  measured = [
    measured_cell("majority_vote", None, 0, [right, wrong, wrong, wrong]),
    measured_cell("best_of_n", "value", 0, [right, right, wrong, wrong]),
    measured_cell("mcts", "value", 0, [right, wrong, right, right]),
    measured_cell("mcts", "checker", 0, [right, right, right, right]),
    measured_cell("majority_vote", None, 1, [right, wrong, wrong, wrong]),
    measured_cell("best_of_n", "value", 1, [right, wrong, wrong, wrong]),
    measured_cell("mcts", "value", 1, [right, right, right, wrong]),
  ]
  rows = {(r.name, r.reward): r for r in search.summarize(measured)}
  base, tree = rows["best_of_n", "value"], rows["mcts", "value"]
  per_problem = np.array([1.0, 0.5, 0.0, 0.0])
  assert base.accuracy == (0.375, *bootstrap_interval(per_problem))
  assert base.gain is None and base.num_seeds == 2
  difference = np.array([1.0, 0.5, 1.0, 0.5]) - per_problem
  assert tree.gain == (0.375, *bootstrap_interval(difference))
  # Votes know no reward: they are compared with best-of-N by value.
  assert rows["majority_vote", None].gain[0] == -0.125
  # There is no best-of-N with the checker here.
  assert rows["mcts", "checker"].gain is None
  assert rows["mcts", "checker"].num_seeds == 1
  assert (
    tree.budget == 5
    and tree.tokens == 4.5
    and tree.seconds == 1.5
    and tree.requests == 1
  )
  table = search.make_table(measured)
  assert table == search.make_table(measured)
  lines = table.split("\n")
  assert len(lines) == 6 and len(set(map(len, lines))) == 1
  assert "| value   | mcts " in table and "+37.5%" in table
  assert " 90% |" in table
  assert search.draw(measured) is not None
  # Nothing to draw without a strategy that has a reward.
  assert (
    search.draw([one for one in measured if "reward" not in one.cell]) is None
  )


def test_a_context_knows_its_policy_and_problems(trained, toy_context):
  same = toy_context.identity()
  problems = trained.task.heldout_problems(PROBLEMS)
  assert Context(trained, problems).identity() == same
  fewer = Context(trained, problems[:-1]).identity()
  assert fewer["policy"] == same["policy"]
  assert fewer["problems"] != same["problems"]
  # One bit of one weight.
  leaves, tree = jax.tree.flatten(trained.params)
  nudged = np.asarray(leaves[0]).copy()
  nudged.flat[0] = np.nextafter(nudged.flat[0], np.float32(9))
  params = jax.tree.unflatten(tree, [nudged, *leaves[1:]])
  other = dataclasses.replace(trained, params=params)
  changed = Context(other, problems).identity()
  assert changed["policy"] != same["policy"]
  assert changed["problems"] == same["problems"]
  config = tiny_config("network.rope_base=77.0")
  other = dataclasses.replace(trained, config=config)
  assert Context(other, problems).identity()["policy"] != same["policy"]
  # What only trains a policy is no part of it.
  config = tiny_config("learn.optimizer.b1=0.5")
  other = dataclasses.replace(trained, config=config)
  assert Context(other, problems).identity() == same


# The study of guidance.


def found(text, log_probs, outcome, is_finished=True):
  logs = np.array(log_probs, np.float32)
  return FoundSolution(
    1, text, (1,), np.ones(len(logs)), logs, logs, is_finished, outcome, 1
  )


def entropy(counts):
  """Of classes of these sizes, over its most."""
  shares = np.array(counts) / sum(counts)
  return -(shares @ np.log(shares)) / math.log(sum(counts))


def test_guidances_are_what_their_names_say():
  problem = Problem("p", "toy", "", {})
  solutions = [
    found("a", [-1.0, -3.0], 0.9),
    found("b", [-0.5], 0.4),
    found("a ", [-2.0, -2.0], 0.1),
    found("none", [-0.25], 0.8),
    found("cut", [-9.0], 0.7, is_finished=False),
  ]
  answers = ["a", "b", "a", None, None]
  verdicts = [Verdict(True, "", answer) for answer in answers]
  task = SimpleNamespace(heuristic=lambda problem, text: len(text) / 10)
  finished = ["a", "b", "a ", "none"]
  context = SimpleNamespace(
    judge=lambda searched: verdicts,
    trained=SimpleNamespace(task=task),
    classes_fn=lambda problem, texts: [finished.index(t) == 1 for t in texts],
  )
  solutions = [
    dataclasses.replace(solution, path=(i, i + 1))
    for i, solution in enumerate(solutions, 1)
  ]
  values = np.array([0.0, 0.5, 0.4, 0.0, 0.2, 0.1, 0.6])
  nodes = {"value": values, "reward": np.eye(7)[3] * 0.8}
  one = Searched(problem, solutions, 0, nodes, {})
  expected = {
    "value": [0.9, 0.4, 0.1, 0.8, 0.7],
    "self_evaluation": [0.9, 0.4, 0.1, 0.8, 0.7],  # its search scored by it
    "sequence_log_prob": np.exp([-4, -0.5, -4, -0.25, -9]),
    "mean_log_prob": np.exp([-2, -0.5, -2, -0.25, -9]),
    "least_log_prob": np.exp([-3, -0.5, -2, -0.25, -9]),
    "self_consistency": [0.5, 0.25, 0.5, 0, 0],
    "weighted_consistency": [1 / 2.2, 0.4 / 2.2, 1 / 2.2, 0, 0],
    "semantic_entropy": [1 - entropy([2, 1, 1, 1])] * 5,
    "semantic_entropy_by_policy": [1 - entropy([3, 1, 1])] * 5,
    "heuristic": [0.1, 0.1, 0.2, 0.4, 0.3],
    "value_min": [0.4, 0.4, 0.2, 0.1, 0.1],
    "value_product": [0.2, 0.32, 0.16, 0.02, 0.06],
    "value_mean": [0.45, 0.6, 0.5, 0.15, 0.35],
  }
  assert guidance.GUIDANCES.keys() == expected.keys()
  for name, scores in expected.items():
    given = guidance.GUIDANCES[name](context, one)
    np.testing.assert_allclose(given, scores, rtol=1e-6, err_msg=name)
  nothing = Searched(problem, [], None, {}, {})
  context.judge = lambda searched: []
  for scores in guidance.GUIDANCES.values():
    assert len(scores(context, nothing)) == 0


def scored_cell(name, seed, problem, scores, is_correct):
  return Measured(
    {"guidance": name, "seed": seed},
    dict(num_problems=3, problem=problem, scores=scores, is_correct=is_correct),
  )


def test_the_table_of_guidance_by_hand():
  # The third problem has no finished solution, the second one by seed 1 alone.
  measured = [
    scored_cell("p", 0, [0, 0, 0], [0.9, 0.1, 0.5], [True, False, True]),
    scored_cell("p", 1, [0, 0, 1], [0.7, 0.7, 0.2], [True, False, False]),
    scored_cell("s", 0, [0, 0], [-3.0, 0.4], [True, True]),
  ]
  *_, line, other = guidance.make_table(measured).split("\n")
  cells = [cell.strip() for cell in line.strip("|").split("|")]
  means = [cell.split(" ")[0] for cell in cells]
  # Right 0.9 0.5 0.7, wrong 0.1 0.7 0.2: 9 pairs, 0.5 < 0.7, 0.7 = 0.7.
  assert means[:2] == ["p", f"{7.5 / 9:.3f}"]
  # Within a search: two pairs of seed 0 in order, a tie of seed 1.
  assert means[2] == f"{2.5 / 3:.3f}"
  squares = [0.1**2, 0.5**2, 0.3**2, 0.1**2, 0.7**2, 0.2**2]
  assert means[4] == f"{np.mean(squares):.3f}"
  # Answers of six searches: right; a tie; wrong; none.
  assert means[5] == f"{1.5 / 6:.3f}"
  assert cells[6:] == ["6", "50.0%"]
  # All are right: no AUROC. Scores outside [0, 1] are no probabilities.
  cells = [cell.strip() for cell in other.strip("|").split("|")]
  assert cells[:5] == ["s", "-", "-", "-", "-"]
  assert guidance.make_table(measured) == guidance.make_table(measured)
  assert guidance.draw(measured) is not None
  assert guidance.draw(measured[2:]) is None


def test_guidances_share_their_searches(toy_context, monkeypatch):
  calls = []
  solver = toy_context.solver

  def counted(options):
    calls.append(options)
    return solver(options)

  monkeypatch.setattr(toy_context, "solver", counted)
  monkeypatch.setattr(guidance, "NUM_SOLUTIONS", NUM_SOLUTIONS)
  cells = guidance.make_cells(toy_context, 1)
  results = [guidance.measure(toy_context, cell) for cell in cells]
  taught = {"self_evaluation", "semantic_entropy_by_policy"}
  names = set(guidance.GUIDANCES) - taught
  assert {cell["guidance"] for cell in cells} == names and len(calls) == 2
  for cell, result in zip(cells, results, strict=True):
    searched, _ = toy_context.search(guidance._options(cell), 0)
    finished = [
      (i, toy_context.trained.task.check(one.problem, s.text).is_correct)
      for i, one in enumerate(searched)
      for s in one.solutions
      if s.is_finished
    ]
    assert 0 < len(finished) < NUM_SOLUTIONS * PROBLEMS
    pairs = zip(result["problem"], result["is_correct"], strict=True)
    assert list(pairs) == finished
    assert len(result["scores"]) == len(finished)
    assert all(math.isfinite(score) for score in result["scores"])
  # The last ones score by steps.
  assert max(len(s.path) for one in searched for s in one.solutions) > 1


def test_a_policy_that_was_taught_more_scores_the_same_solutions(
  trained, monkeypatch
):
  class Curt(ToyTask):
    verdict_words = ("1", "2")  # which the tiny policy likes

  task = Curt(num_numbers=3, min_number=1, max_number=9)
  config = tiny_config()
  with config.unlocked():
    config.learn.rows.comparing = 2
  context = Context(
    dataclasses.replace(trained, task=task, config=config),
    task.heldout_problems(2),
  )
  monkeypatch.setattr(guidance, "NUM_SOLUTIONS", 2)
  cells = guidance.make_cells(context, 1)
  assert [cell["guidance"] for cell in cells] == list(guidance.GUIDANCES)
  by_value, by_classes, by_judgement = (
    guidance.measure(context, cell)
    for cell in cells
    if cell["guidance"]
    in ("value", "semantic_entropy_by_policy", "self_evaluation")
  )
  for name in ("problem", "is_correct"):
    assert by_value[name] == by_judgement[name] == by_classes[name]
  assert by_value["scores"] != by_judgement["scores"]
  assert all(0 <= score <= 1 for score in by_judgement["scores"])
  # Of two solutions, which are of one class or of two.
  assert set(by_classes["scores"]) <= {0.0, 1.0}


def test_a_policy_without_words_to_compare_is_refused(trained):
  config = tiny_config()
  with config.unlocked():
    config.learn.rows.comparing = 2
  context = Context(
    dataclasses.replace(trained, config=config),
    trained.task.heldout_problems(1),
  )
  (cell,) = (
    cell
    for cell in guidance.make_cells(context, 1)
    if cell["guidance"] == "semantic_entropy_by_policy"
  )
  with pytest.raises(ValueError, match="entailment: the verdict 'yes' has"):
    guidance.check(context, cell)


# The study of random legal play.


def test_texts_are_counted_once_up_to_the_first_right_one():
  task = make_task("game24")
  context = TaskContext(task, [task.parse("4 4 6 8")])
  (problem,) = context.problems
  choices = make_choices(4)

  def choice(first, second, symbol):
    found = zip(choices.first, choices.second, choices.op, strict=True)
    return list(found).index((first, second, "+-*/".index(symbol)))

  # 4 + 4 = 8 and 6 + 8 = 14, then 8 + 14 or 8 - 14: both are wrong. 4 - 4 = 0,
  # which two choices write.
  start = [choice(0, 1, "+"), choice(0, 1, "+")]
  plays = [[*start, choice(0, 1, "+")], [*start, choice(0, 1, "-")]]
  plays += [plays[0]]
  plays += [[c, *start] for c in (choice(0, 1, "-"), choice(1, 0, "-"))]
  # 4 * (8 - (6 - 4)).
  right = [choice(2, 0, "-"), choice(1, 2, "-"), choice(0, 1, "*")]
  assert task.check(problem, play_text([4, 4, 6, 8], right)).is_correct
  plays = np.array([*plays, right, plays[0]])
  is_right = np.arange(len(plays)) == 5
  count = functools.partial(legal_play.count_texts, context, problem)
  assert count(plays, is_right, 300) == (4, 4)
  assert count(plays[:5], is_right[:5], 300) == (0, 3)
  assert count(plays, is_right, 2) == (0, 2)
  with pytest.raises(AssertionError, match="reaches 22, not 24"):
    count(plays, ~is_right, 300)


def played(name, seed, solved_at, num_texts):
  cell = {"name": name, "seed": seed, "most_texts": 300}
  found = dict(solved_at=solved_at, num_texts=num_texts, seconds=2.0 + seed)
  return Measured(cell, found)


def test_one_run_tells_every_budget():
  measured = [
    played("best_of_n", 0, [0, 20, 300, 10], [300, 20, 300, 10]),
    played("best_of_n", 1, [0, 40, 120, 0], [300, 40, 120, 200]),
    played("mcts_uct", 0, [10, 20, 0, 10], [10, 20, 300, 10]),
  ]
  rows = {(r.name, r.budget): r for r in legal_play.summarize(measured)}
  by_hand = {10: [0, 0, 0, 0.5], 30: [0, 0.5, 0, 0.5], 100: [0, 1, 0, 0.5]}
  by_hand[300] = [0, 1, 1, 0.5]
  for budget, solved in by_hand.items():
    base = rows["best_of_n", budget]
    interval = bootstrap_interval(np.array(solved))
    assert base.solved == (np.mean(solved), *interval) and base.gain is None
    tree = np.array([1, budget >= 30, 0, 1])
    assert rows["mcts_uct", budget].gain[0] == np.mean(tree - solved)
  assert rows["best_of_n", 100].texts == (100 + 30 + 100 + (10 + 100) / 2) / 4
  assert rows["best_of_n", 10].seconds == 2.5
  table = legal_play.make_table(measured)
  assert len(table.split("\n")) == 2 + 2 * len(legal_play.BUDGETS)
  assert legal_play.draw(measured) is not None
  assert legal_play.draw([]) is None


# The command.


def test_legal_play_needs_no_run(command, capsys, tmp_path, monkeypatch):
  monkeypatch.setattr(legal_play, "BUDGETS", (2, 20))
  path = tmp_path / "games.jsonl"
  path.write_text(
    '{"nums": [1, 2, 3], "target": 6}\n{"nums": [5, 7, 9], "target": 21}\n'
  )
  command(
    "--study=legal_play",
    "--task=countdown",
    "--num_cpu_devices=8",
    f"--workdir={tmp_path}",
    f"--problems={path}",
    "--only=name=mcts_uct",
    "--seeds=1",
  )
  printed = capsys.readouterr().out
  assert "Study legal_play: countdown, 2 problems" in printed
  (result,) = (tmp_path / "studies" / "legal_play").glob("*.json")
  found = json.loads(result.read_text())["result"]
  # 1 + 2 + 3 and 1 * 2 * 3 are many of the plays.
  assert 1 <= found["solved_at"][0] <= 20
  pairs = zip(found["solved_at"], found["num_texts"], strict=True)
  assert all(texts == (at or 20) for at, texts in pairs)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "run"
  tiny_workdir(workdir, 2)
  return workdir


@pytest.fixture
def command(monkeypatch):
  """The command in this process."""

  def call(*arguments):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for define in (
      flags.DEFINE_string,
      flags.DEFINE_list,
      flags.DEFINE_integer,
    ):
      define = functools.partial(define, flag_values=values)
      monkeypatch.setattr(flags, define.func.__name__, define)
    study.define_flags()
    values(["study", *arguments])
    study.main(["study"])

  monkeypatch.setattr(mesh_lib, "enable_compilation_cache", lambda _: None)
  return call


def test_the_command_prints_the_table_that_it_writes(workdir, command, capsys):
  arguments = (f"--workdir={workdir}", "--study=search", "--num_problems=4")
  one = ("--seeds=1", "--only=name=greedy")
  command(*arguments, *one)
  folder = workdir / "studies" / "search"
  printed = capsys.readouterr().out
  assert printed == (folder / "table.md").read_text()
  assert "iteration 1, 4 problems (0 of them of the training share)" in printed
  assert printed.count("greedy") == 1
  assert not (folder / "figure.svg").exists()
  results = list(folder.glob("*.json"))
  assert len(results) == 1
  command(*arguments, *one)
  assert capsys.readouterr().out == printed
  assert list(folder.glob("*.json")) == results
  # Another checkpoint is another policy.
  command(*arguments, *one, "--iteration=0")
  assert len(list(folder.glob("*.json"))) == 2


def test_problems_come_from_a_file(workdir, command, capsys, tmp_path):
  path = tmp_path / "problems.txt"
  path.write_text("1 2 3 = 6\n\n2 3 4 = 24\n1 1 1 = 3\n")
  task = load.from_workdir(workdir).task
  problems = study.read_problems(path, task)
  assert problems == [
    task.parse(text) for text in ("1 2 3 = 6", "2 3 4 = 24", "1 1 1 = 3")
  ]
  command(
    f"--workdir={workdir}",
    "--study=search",
    "--only=name=greedy",
    f"--problems={path}",
    "--num_problems=2",
  )
  share = sum(map(task.is_train, problems[:2]))
  words = f"2 problems ({share} of them of the training share)"
  assert words in capsys.readouterr().out
  path.write_text(
    '{"id": 7, "puzzle": "1 2 3 = 6"}\n'
    '{"nums": [2, 3, 4], "target": 24, "solvable": true}\n'
    '{"prompt": "1 1 1 = 3\\n"}\n'
  )
  assert study.read_problems(path, task) == problems
  for text, error in (
    ("1 2 3 = 6\n1 2 3\n", ":2: "),
    ("1 2 3 = 6\n{3}\n", ":2: Expecting"),
    ('{"nums": "1 2 3"}\n', ":1: give it a puzzle or a prompt, or nums"),
    ("1 2 3 = 6\n\n1 2 3 = 6\n", ":3: '1 2 3 = 6' comes again"),
    ("\n", "holds no problem"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"problems.txt.*{error}"):
      study.read_problems(path, task)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--study=search", "--problems=no.txt"], "No such file"),
    (["--study=serach"], "unknown study 'serach': did you mean 'search'?"),
    ([], "--study is missing: --study=search"),
    (["--study=search", "--seeds=0"], "--seeds=0 is below 1"),
    (["--study=search", "--task=game24"], "--task is not for the study search"),
    (["--study=legal_play", "--iteration=1"], "--iteration is not for the"),
    (["--study=search", "--num_problems=-2"], "--num_problems=-2 is below 1"),
    (["--study=search", "--max_cells=0"], "--max_cells=0 is below 1"),
    (
      ["--study=search", "--only=strategy=beast_of_n"],
      "unknown strategy 'beast_of_n': did you mean 'best_of_n'?",
    ),
    (
      ["--study=guidance", "--only=guidance=valu"],
      "unknown guidance 'valu': did you mean 'value'?",
    ),
    (["--study=search", "--num_problems=1000000"], "held-out problems"),
  ],
)
def test_bad_flags_end_with_one_line(workdir, command, arguments, words):
  with pytest.raises(config_lib.UserError) as error:
    command(f"--workdir={workdir}", "--num_problems=4", *arguments)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_ends_with_exit_code_2():
  done = subprocess.run(
    [sys.executable, "-m", "o1jax.study", "--study=serach", "--workdir=x"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == (
    "error: unknown study 'serach': did you mean 'search'? known: "
    f"{', '.join(studies.STUDIES)}\n"
  )
