"""The study of behaviours: its tables by hand, cells on a tiny policy."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from o1jax.encoding import Lengths
from o1jax.learning.optimizer import make_optimizer
from o1jax.searched import FoundSolution, Searched
from o1jax.studies import behaviors, learner, search
from o1jax.studies.context import Context
from o1jax.studies.study import Measured
from o1jax.tasks import make_task
from policies import (
  ToyTask,
  tiny_config,
  tiny_context,
  tiny_policy,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

CELL = {
  "name": "six",
  "seed": 0,
  "num_updates": 10,
  "num_tokens": 600,
  "num_rounds": 1,
  "num_round_updates": 10,
  "num_round_tokens": 40,
  "num_draws": 2,
  "num_trees": 6,
  "num_others": 2,
}


@pytest.fixture(scope="module")
def context():
  with contextlib.closing(tiny_context()) as made:
    yield made


@pytest.fixture
def short_texts(monkeypatch):
  """Long thoughts of one line: a tiny policy spells them letter by letter."""
  whole = ToyTask.long_thoughts

  def short(self, rng, n, **options):
    pairs = whole(self, rng, n, **options)
    return [(problem, text.split("\n")[0]) for problem, text in pairs]

  monkeypatch.setattr(behaviors, "_NUM_TRIED", 4)
  monkeypatch.setattr(ToyTask, "long_thoughts", short)
  # Those of other tasks are longer, and there is no need of the room.
  monkeypatch.setattr(behaviors, "TASKS", {"countdown": ToyTask, "game24": 0})
  monkeypatch.setattr(
    behaviors, "make_task", lambda name: Silent(heldout_seed=3)
  )


class Silent(type(make_task("game24"))):
  demonstration_kinds = ("optimal",)


def test_a_cell_tunes_reinforces_and_reads(context, short_texts, monkeypatch):
  behaviors.check(context, CELL)
  read, seen = behaviors._Run.read, []

  def noted(run):
    # Copies: an update gives up what it begins with.
    seen.append(np.array(run._params["trunk"]["embedding"]))
    return read(run)

  monkeypatch.setattr(behaviors._Run, "read", noted)
  before = jax.device_get(context.trained.params)
  result = behaviors.measure(context, CELL)
  assert result["tasks"] == ["countdown", "game24"]
  assert np.shape(result["correct/countdown"]) == (3, 4)
  assert np.shape(result["counts/game24"]) == (3, 2, 8)
  start, tuned, _ = result["tokens/countdown"]
  assert start != tuned and min(start) > 0
  # Each stage is of the parameters that it came to.
  assert len(seen) == 3
  assert np.any(seen[0] != seen[1]) and np.any(seen[1] != seen[2])
  # As many tokens as asked for, to the rows that a batch divides into.
  assert 0.5 * 6000 < result["learned"] < 1.5 * 6000
  assert 40 <= result["sampled"] and result["seconds"] > 0
  assert len(result["right"]) == 1 and 0 < result["right"][0] < 1
  # As it is kept.
  plain = {name: np.asarray(value).tolist() for name, value in result.items()}
  kept = json.loads(json.dumps(plain, allow_nan=False))
  assert behaviors.make_table([Measured(CELL, kept)]).count("countdown") == 3
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(context.trained.params),
    before,
  )


def test_chains_are_compared_with_searches_of_their_tokens(
  context, short_texts, monkeypatch
):
  monkeypatch.setattr(behaviors, "_TREE_EFFORT", 1)
  # The policy's own trees are byte soup, in which no right text is found.
  monkeypatch.setattr(
    behaviors,
    "linearized",
    lambda trees, judge_fn, **_: [(one.problem, "1+2\n") for one in trees],
  )
  asked = []

  def measure(given, cell):
    assert given is context
    search.check(context, cell)
    asked.append(cell)
    return {"selected": [0] * 4, "generated_tokens": [len(asked)] * 4}

  # The study of search is tested where it is.
  monkeypatch.setattr(behaviors.search, "measure", measure)
  result = behaviors.measure(context, CELL | {"name": "linearized"})
  assert np.shape(result["correct/countdown"]) == (2, 4)
  assert result["sampled"] == 0 and result["learned"] > 0
  assert result["tokens/mcts"] == [1] * 4
  assert result["tokens/best_of_n"] == [2] * 4
  chain = np.mean(result["tokens/countdown"][-1])
  effort = round(chain / context.tokens_per_solution(search.NUM_MEASURED))
  assert [cell["effort"] for cell in asked] == [max(effort, 1)] * 2
  assert [cell["reward"] for cell in asked] == ["value"] * 2


def test_policies_are_tuned_on_as_many_tokens_of_other_texts(context):
  task = context.task
  for name, kinds in behaviors.DEMONSTRATIONS.items():
    run = behaviors._Run(context, CELL | {"name": name})
    run._prepare()
    batches = run._text_batches()
    count = np.count_nonzero(batches.policy_weights)
    assert count == run.costs()["learned"]
    assert 0.6 * 6000 < count < 1.4 * 6000, name
    assert kinds[0] in task.demonstration_kinds
    row = batches.tokens[0, 0].tolist()
    text = run._own.tokenizer.decode(row)
    assert ("<answer>" in text) == (name != "plain")


def found(problem, text, is_finished=True):
  nothing = np.zeros(0, np.float32)
  one = FoundSolution(1, text, (1,), nothing, nothing, nothing, is_finished,
                      0.0, 1)  # fmt: skip
  return Searched(problem, [one], 0, {}, {"generated_tokens": 9})


def test_a_text_is_judged_by_its_answer_and_read_by_the_meter():
  task = make_task("countdown", integers_only=True)
  problem = task.parse("3 7 2 = 13")
  answer = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"
  text = (
    "7 - 3 = 4 (left: 2 4)\nanother way: 3 + 7\n"
    "3 + 7 = 10 (left: 2 10)\ncheck: 10 + 2 = 12, not 13\n"
    "instead try 3 * 2\ncheck: 10 - 2 = 8, not 13\n3 * 2 = 6 (left: 7 6)\n"
    f"<answer>\n{answer}\n</answer>"
  )
  read = behaviors._read(task, found(problem, text))
  assert read.correct and not read.cut and read.tokens == 9
  # The second failed check is answered by a step; what follows a step is no
  # answer to a check.
  assert (read.failed, read.answered) == (2, 1)
  assert sum(read.counts) >= 4
  assert not behaviors._read(task, found(problem, text, False)).correct
  assert not behaviors._read(task, found(problem, "7 + 3 = 10")).correct


def measured(name, seed, correct, **more):
  stages = np.shape(correct)
  zeros = np.zeros(stages).tolist()
  result = {
    "tasks": ["countdown"],
    "correct/countdown": correct,
    "tokens/countdown": (np.ones(stages) * 10).tolist(),
    "cut/countdown": zeros,
    "failed/countdown": (np.ones(stages) * 4).tolist(),
    "answered/countdown": np.ones(stages).tolist(),
    "counts/countdown": np.ones((*stages, 8)).tolist(),
    "learned": 100,
    "text_tokens": 10.0,
    "sampled": 50,
    "right": [0.25, 0.5, 0.75] if len(correct) == 3 else [],
    "seconds": 2.0,
  }
  return Measured(CELL | {"name": name, "seed": seed}, result | more)


def test_the_tables_pool_seeds_by_problem():
  searches = {
    "correct/mcts": [1, 1],
    "correct/best_of_n": [0, 0],
    "tokens/mcts": [12, 14],
    "tokens/best_of_n": [10, 10],
  }
  cells = [
    measured("plain", 0, [[0, 0], [0, 0], [1, 0]]),
    measured("six", 0, [[0, 0], [1, 0], [1, 1]]),
    measured("six", 1, [[0, 0], [0, 0], [1, 1]]),
    measured("linearized", 0, [[0, 0], [1, 0]], **searches),
  ]
  rows = {(row.name, row.stage): row for row in behaviors.summarize(cells)}
  assert len(rows) == 8 and ("linearized", "reinforced") not in rows
  tuned = rows["six", "tuned"]
  assert tuned.accuracy[0] == 0.25 and tuned.num_seeds == 2
  assert tuned.answered == 0.25 and tuned.counts == (1.0,) * 8
  gaps = {(g.name, g.stage): g.gap[0] for g in behaviors.compare(cells)}
  assert gaps == {
    ("six", "tuned"): 0.25,
    ("six", "reinforced"): 0.5,
    ("linearized", "tuned"): 0.5,
  }
  first, second, third, costs = behaviors.make_table(cells).split("\n\n")
  assert len(first.splitlines()) == 10 and len(second.splitlines()) == 5
  assert "+50.0%" in third and "-50.0%" in third and "13.0" in third
  assert len(costs.splitlines()) == 5
  assert "25.0%" in costs and "75.0%" in costs and "50.0%" not in costs
  assert behaviors.draw(cells) is not None and behaviors.draw([]) is None
  # Of a grid that is not measured yet.
  assert behaviors.make_table([]).startswith("| problems")


def test_no_failed_check_has_no_share():
  silent = measured("six", 0, [[0], [0], [0]], **{
    "failed/countdown": [[0], [0], [0]],
    "answered/countdown": [[0], [0], [0]],
  })  # fmt: skip
  assert all(row.answered is None for row in behaviors.summarize([silent]))


def test_a_runs_own_way_of_learning_is_taken_out(context):
  own = (
    "learn.reference=start",
    "learn.learning_rate_scale=0.5",
    "learn.num_microbatches=2",
  )
  trained = dataclasses.replace(context.trained, config=tiny_config(*own))
  regime = behaviors._ppo_regime(
    Context(trained, context.problems),
    CELL,
    trained.policy,
    3,
    make_optimizer(learning_rate=1e-3),
  )
  learn = regime.config.learn
  assert learn.rows.to_dict() == {"policy_gradient": 3}
  assert learn.reference == "none" and learn.learning_rate_scale == 1
  assert learn.num_microbatches == 1


def test_a_gradient_that_is_not_finite_is_seen_in_any_call():
  calls = learner.UPDATES_PER_CALL

  def update(state, finite):
    return state + 1, {"is_finite": np.full(calls, finite)}

  for bad in range(3):
    found = iter([float(i != bad) for i in range(3)])
    with pytest.raises(AssertionError, match="not finite"):
      learner.learn(update, 0, lambda f=found: next(f), 3 * calls)
  assert learner.learn(update, 0, lambda: 1.0, 3 * calls) == 3


def test_what_does_not_fit_is_refused_before_anything(context):
  for changed, message in (
    ({"num_updates": 15}, "num_updates=15"),
    ({"num_round_updates": 0}, "num_round_updates=0"),
  ):
    with pytest.raises(ValueError, match=message):
      behaviors.check(context, CELL | changed)
  task = make_task("arithmetic")
  policy = dataclasses.replace(tiny_policy(), lengths=Lengths(20, 5, 2, 64))
  other = dataclasses.replace(context.trained, task=task, policy=policy)
  problems = task.heldout_problems(2)
  with pytest.raises(ValueError, match="arithmetic has no demonstrations"):
    behaviors.check(Context(other, problems), CELL)
  config = context.trained.config.copy_and_resolve_references()
  with config.unlocked():
    del config.learn.average_decay
  old = dataclasses.replace(context.trained, config=config.lock())
  with pytest.raises(ValueError, match=r"learn\.average_decay"):
    behaviors.check(Context(old, context.problems), CELL)
