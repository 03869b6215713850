"""The policy that ships answers, and shows how."""

import functools
import pathlib
import subprocess
import sys

import pytest

from o1jax import config as config_lib
from o1jax import load
from o1jax import solve as solving
from o1jax.load import DEFAULT
from o1jax.policy import pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEARNED = (
  "training problems have 3 numbers from 1 to 20 and targets from 10 to 99"
)
MAX_BYTES = 4 * 10**6


@functools.cache
def session():
  return solving.load_default()


@functools.cache
def solved(**options):
  seen = []
  answer = solving.solve(
    session(), "3 7 2 = 13", effort=8, watch=seen.append, **options
  )
  return answer, [text for texts in seen for text in texts]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "o1jax.solve", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


@pytest.mark.parametrize("path", ["", str(DEFAULT)])
def test_a_policy_folder_has_no_iterations(path):
  with pytest.raises(config_lib.UserError) as raised:
    load.from_path(path, 3)
  assert "--iteration=3 needs the workdir of a run" in str(raised.value)
  assert str(DEFAULT) in str(raised.value)


def test_the_policy_that_ships_is_small():
  assert sum(path.stat().st_size for path in DEFAULT.iterdir()) < MAX_BYTES
  card = pretrained.load_card(DEFAULT)
  assert card["config"]["task"]["name"] == "countdown"
  assert card["versions"]["jax"] and card["iteration"] > 0


def test_the_command_shows_reasoning_tree_and_answer():
  done = run("--effort=8", "3 7 2 = 13")
  assert done.returncode == 0, done.stderr
  steps, tree, answer, spent = done.stdout.split("\n\n")
  assert steps.startswith("steps, as the search proposes them:\n")
  assert "(left: " in steps
  # Prompts of this policy have their numbers in order.
  assert tree.startswith("tree:\n") and "2 3 7 = 13" in tree
  head, *lines = answer.split("\n")
  assert head == f"answer ({solved()[0].verdict.reason}):"
  assert "\n".join(lines) == solved()[0].text
  cost = solved()[0].cost
  assert spent.strip() == ", ".join(f"{n} {v}" for n, v in cost.items())


def test_the_search_does_not_see_the_checker_unless_asked():
  answer, seen = solved()
  assert answer.cost["verifier_requests"] == 0
  task = session().trained.task
  problem = task.parse("3 7 2 = 13")
  assert answer.verdict == task.check(problem, answer.text)
  marks = [row["is_correct"] for row in answer.tree["nodes"]]
  checked, _ = solved(reward="checker")
  assert checked.cost["verifier_requests"] > 0
  # With the checker a right solution that was found is the answer.
  found = [row["is_correct"] for row in checked.tree["nodes"]]
  assert checked.verdict.is_correct == (True in found)
  assert len(marks) - 1 <= len(seen)
  assert answer.text in {text.rstrip("\n") for text in seen}


def test_the_same_seed_gives_the_same_answer():
  again = solving.solve(session(), "3 7 2 = 13", effort=8)
  assert again == solved()[0]
  other = solving.solve(session(), "3 7 2 = 13", effort=8, seed=1)
  assert other.tree != again.tree


def test_problems_that_cannot_be_solved_end_with_one_line():
  done = run("1 1 1 = 99")
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and "1 1 1 = 99" in line


@pytest.mark.parametrize(
  "text, effort, words",
  [
    ("3 7 2 13", "low", "3 7 2 13"),
    ("", "low", "''"),
    ("3 7 two = 13", "low", "3 7 two = 13"),
    ("1 1 1 = 99", "low", "no solution"),
    ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 = 100", "low", "14 numbers"),
    (
      "3 7 2 1 = 13",
      "low",
      f"{LEARNED}: this policy cannot solve '1 2 3 7 = 13'",
    ),
    ("3 10 = 13", "low", LEARNED),
    ("3 7 25 = 46", "low", LEARNED),
    ("3 2 2 = 7", "low", LEARNED),
    ("3 7 2 = 13", "huge", "effort 'huge' is none of low, medium, high"),
    ("3 7 2 = 13", "0", "effort '0'"),
  ],
)
def test_bad_problems_and_efforts_are_refused(text, effort, words):
  with pytest.raises(config_lib.UserError) as raised:
    solving.solve(session(), text, effort=effort)
  assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("strategy", ["best_of_n", "majority_vote"])
def test_an_effort_is_the_same_for_every_strategy(strategy):
  tokens = []
  for effort in (2, 4):
    answer = solving.solve(
      session(), "3 7 2 = 13", strategy=strategy, effort=effort
    )
    assert len(answer.tree["nodes"]) == 1 + effort
    tokens.append(answer.cost["generated_tokens"])
  lengths = session().trained.policy.lengths
  per_solution = lengths.num_steps * lengths.step_tokens
  assert 0 < tokens[0] < tokens[1] <= 4 * per_solution
  with pytest.raises(config_lib.UserError, match="strategy='guess'"):
    solving.solve(session(), "3 7 2 = 13", strategy="guess")


def test_control_characters_of_a_text_do_not_reach_the_terminal(capsys):
  solving.show_reached(["1 + 2 = 3\n\x1b[31m4", "5"])
  printed = capsys.readouterr().out
  assert "\x1b" not in printed
  first, second = printed.splitlines()
  assert first.startswith("  ") and first.endswith("4")
  assert second == "5"
