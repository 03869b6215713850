"""Seconds of one on-policy step, ours beside peers (goal P10).

  python benchmarks/on_policy.py --size=S --microbatches=4 \
    --python_trl=PATH --python_tunix=PATH
  python benchmarks/on_policy.py --clock=wall --devices=2 --size=S \
    --microbatches=2

A step draws `group` solutions of fixed length for each of `prompts` problems,
scores them on the host by a trivial reward (is the text of even length?),
normalises rewards by group and makes one clipped policy-gradient update with
AdamW. No reference model, one update of all rows.

Ours is an iteration of `iterate.loop` with the same parts: Solver (best_of_n),
Verifier, the experience, FreshRows, RowMaker, `make_updates`. What was drawn
with comes with the draws; values and log-probs of the trainer are a forward
pass of their own before the update, which also learns a value, clips, averages
the parameters and looks for gradients that are not finite. Left out: files,
reports and evaluation. Two departures: texts are numbers of tokens, and
solutions, which have no end mark so that all are equally long, count as
finished.

Peers run in processes of their own, each with its Python, and wait inside
their reward function for their turn: a step is the time between two calls of
it. The first two are not counted. Their C library keeps freed memory as ours
does, but with `--as_shipped`. A peer that is not installed is named and left
out.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import common
import jax
import numpy as np

import o1jax
from o1jax import mesh as mesh_lib
from o1jax import scoring
from o1jax.encoding import Lengths, Policy
from o1jax.experience import Experience
from o1jax.fresh_rows import FreshRows
from o1jax.learning import baselines
from o1jax.learning.objective import Objective, PolicyGradient
from o1jax.learning.optimizer import make_optimizer
from o1jax.learning.update import make_score, make_state, make_updates
from o1jax.policy import next_token_log_probs
from o1jax.process_rewards import Process
from o1jax.reward.outcome import Verifier
from o1jax.rollouts import Advantages, Pairs
from o1jax.rows import RowMaker
from o1jax.solver import Solver
from o1jax.types import Problem, Verdict

PEERS = ("plain_jax", "trl", "tunix")
SHAPE = (
  "vocab_size",
  "num_layers",
  "width",
  "num_heads",
  "num_kv_heads",
  "head_width",
  "ffn_width",
)
SIZES = ("clock", "prompts", "group", "prompt", "new")
# What `mesh.keep_freed_memory` sets for one device: peers have no more of them.
MEMORY = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_THRESHOLD_": str(2**30),
  "MALLOC_TRIM_THRESHOLD_": "-1",
}
NUM_DROPPED = 2  # first steps, which compile


class Numbers:
  """A tokenizer whose texts are the numbers of their tokens.

  The end mark is outside the vocabulary: no solution ends early.
  """

  pad_id = 0
  newline_id = 1
  eos_id = -1

  def encode(self, text: str) -> list[int]:
    return [int(number) for number in text.split()]

  def encode_batch(self, texts) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    return " ".join(map(str, ids))


def check(problem: Problem, text: str) -> Verdict:
  """The reward."""
  del problem
  is_even = len(text) % 2 == 0
  return Verdict(is_even, "correct" if is_even else "odd", None)


def new_problems(rng, vocab_size: int, num: int, length: int) -> list[Problem]:
  """Random prompts; token 0 is the padding and does not occur."""
  tokens = rng.integers(1, vocab_size, (num, length))
  texts = [" ".join(map(str, row)) for row in tokens.tolist()]
  return [Problem(id=text, task="even", prompt=text, data={}) for text in texts]


def make_ours(network, params, args):
  """Our step as a call that blocks."""
  length = args.prompt + args.new
  policy = Policy(network, Numbers(), Lengths(args.prompt, args.new, 1, length))
  task = types.SimpleNamespace(
    check=check, heuristic=None, final_solution=lambda text: text
  )
  mesh = mesh_lib.make_mesh({"data": args.devices})
  mix = {"policy_gradient": args.prompts * args.group}
  solver = Solver(
    policy,
    strategy="best_of_n",
    batch_size=args.prompts,
    num_candidates=args.group,
    mesh=mesh,
    task=task,
  )
  log_probs_fn = functools.partial(next_token_log_probs, network)
  fresh_rows = FreshRows(
    policy,
    task,
    mix,
    make_score(log_probs_fn, mesh=mesh),
    reference="none",
    advantages=Advantages(baseline="group_std", skips_flat=False),
    pairs=Pairs(),
    process=Process(),
    max_value_change=0.0,
  )
  maker = RowMaker(policy, task, mix)
  optimizer = make_optimizer(learning_rate=1e-4, weight_decay=0.01)
  update = make_updates(
    log_probs_fn,
    optimizer,
    objective=Objective(policy_gradient=PolicyGradient(loss="ppo")),
    num_microbatches=args.microbatches,
    average_decay=0.0,
    mesh=mesh,
  )
  verifier = Verifier(check)
  experience = Experience(
    max_search=4096,
    max_hindsight=0,
    max_demonstrations=0,
    max_expert_per_problem=4,
  )
  state = make_state(params, optimizer, mesh)
  moving, calls = baselines.empty_baseline(), 0

  def step():
    nonlocal state, moving, calls
    calls += 1
    rng = np.random.default_rng(calls)
    vocab_size = network.config.vocab_size
    problems = new_problems(rng, vocab_size, args.prompts, args.prompt)
    key = jax.random.key(calls)
    searched = [
      finished(one) for one in solver(state.average_params, key, problems)
    ]
    verdicts = [
      verifier.check([one.problem] * len(one.solutions), texts_of(one))
      for one in searched
    ]
    experience.add(
      scoring.score(task, searched, verdicts, calls, relabels=False)
    )
    decks, moving, numbers = fresh_rows.decks(
      state, searched, verdicts, experience, moving, rng, calls
    )
    assert numbers["learn/draws_kept"] == args.prompts * args.group
    batch, _ = maker.batches(rng, experience, 1, decks)
    state, metrics = update(state, batch)
    metrics = jax.device_get(metrics)
    assert metrics["is_finite"].all()
    jax.block_until_ready(state)

  return step


def texts_of(searched) -> list[str]:
  return [solution.text for solution in searched.solutions]


def finished(searched):
  """The search, as if every solution had an end mark."""
  solutions = [
    dataclasses.replace(solution, is_finished=True)
    for solution in searched.solutions
  ]
  return dataclasses.replace(searched, solutions=solutions)


def timed(step, clock: str):
  """The step as a call that returns its seconds."""
  now = time.process_time if clock == "cpu" else time.perf_counter

  def run():
    begin = now()
    step()
    return now() - begin

  return run


class Peer:
  """A process that makes a step when told to; see on_policy_peers.py.

  Raises:
    ImportError: it is not installed there.
  """

  def __init__(
    self, name: str, python: str, options: dict, *, as_shipped: bool = False
  ):
    script = pathlib.Path(__file__).with_name("on_policy_peers.py")
    self._process = subprocess.Popen(
      [python, str(script), name, json.dumps(options)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | ({} if as_shipped else MEMORY),
    )
    try:
      self.version = self._read()["version"]
    except ImportError:
      self.close()
      raise

  def step(self) -> float:
    # One that has ended says so below, and not as a broken pipe.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    return self._read()["seconds"]

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("a peer ended; its messages stand above")
    answer = json.loads(line)
    if "absent" in answer:
      raise ImportError(answer["absent"])
    return answer


def main(argv=None):
  parser = common.make_parser(__doc__, repeats=9)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--prompts", type=int, default=8)
  parser.add_argument("--group", type=int, default=4, help="solutions of each")
  parser.add_argument("--prompt", type=int, default=32, help="tokens of it")
  parser.add_argument("--new", type=int, default=64, help="of a solution")
  parser.add_argument("--microbatches", type=int, default=1, help="ours")
  parser.add_argument("--devices", type=int, default=1, help="share our rows")
  parser.add_argument("--peers", default="plain_jax,trl,tunix")
  parser.add_argument(
    "--as_shipped", action="store_true", help="peers free their memory"
  )
  for name in PEERS:
    parser.add_argument(f"--python_{name}", default=sys.executable)
  args = parser.parse_args(argv)
  common.start(args.clock, args.devices)
  report = common.Report("on_policy", args.clock)
  network, params = common.random_network(args.size)
  num_tokens = args.prompts * args.group * args.new
  options = {name: getattr(network.config, name) for name in SHAPE} | {
    name: getattr(args, name) for name in SIZES
  }
  runs = {"ours": timed(make_ours(network, params, args), args.clock)}
  versions = {"ours": o1jax.__version__}
  with contextlib.ExitStack() as stack:
    for name in filter(None, args.peers.split(",")):
      try:
        python = getattr(args, f"python_{name}")
        peer = Peer(name, python, options, as_shipped=args.as_shipped)
      except ImportError as error:
        report.skip(name, error)
        continue
      stack.callback(peer.close)
      runs[name], versions[name] = peer.step, peer.version
    for _ in range(NUM_DROPPED):
      for run in runs.values():
        run()
    series = {name: [] for name in runs}
    for _ in range(args.repeats):
      for name, run in runs.items():
        series[name].append(run())
  report.add_series(
    series,
    amounts=dict.fromkeys(series, num_tokens),
    unit="tokens",
    extra={name: {"version": versions[name]} for name in runs},
    size=args.size,
    rows=args.prompts * args.group,
    prompt=args.prompt,
    new=args.new,
  )
  report.close()


if __name__ == "__main__":
  main()
