"""Seconds to lower and compile each program, and that it stays (goal P11).

  python benchmarks/compile_times.py --sizes=S,S8

S8 is S with 8 layers. `lower_s` and `compile_s` are those of one program,
without the compilation cache. `again_s` is what the compiler spends in a second
call with other values of the same shapes: 0 where nothing compiles again. The
generator is several programs: its `compile_s` is lowering and compiling of all.
"""

import functools
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
from fixed_steps import fixed_step_model

from o1jax.learning.objective import Objective
from o1jax.learning.optimizer import make_optimizer
from o1jax.learning.update import make_state, make_update
from o1jax.metrics import Clock
from o1jax.policy import (
  decode_rows,
  make_controls,
  next_token_log_probs,
  prefix_from_prompt,
)
from o1jax.policy.generate import make_generate
from o1jax.search.driver import run_on_device
from o1jax.search.mcts import mcts
from o1jax.types import LearnerBatch, ProblemBatch


def draw_problems(seed, args):
  """Problems whose prompts differ in length."""
  tokens_key, lengths_key = jax.random.split(jax.random.key(seed))
  shape = (args.prompts, args.prompt)
  low = max(args.prompt // 2, 1)
  return ProblemBatch(
    tokens=jax.random.randint(tokens_key, shape, 1, 60, "int32"),
    lengths=jax.random.randint(
      lengths_key, shape[:1], low, args.prompt + 1, "int32"
    ),
    seeds=jnp.arange(args.prompts, dtype=jnp.uint32),
  )


def measure(program, inputs, now):
  """Seconds to lower, to compile, and compiled in a second call."""
  arguments, others = inputs(0), inputs(1)
  begin = now()
  lowered = program.lower(*arguments)
  middle = now()
  lowered.compile()
  end = now()
  jax.block_until_ready(program(*arguments))
  clock = Clock()
  jax.block_until_ready(program(*others))
  return {
    "lower_s": round(middle - begin, 2),
    "compile_s": round(end - middle, 2),
    "again_s": round(clock.compilation(), 2),
  }


def measure_rows(network, params, args, now):
  """Prompts read and continued in one program."""

  @jax.jit
  def program(params, keys, problems):
    prefix, last = prefix_from_prompt(
      network, params, problems.tokens, problems.lengths
    )
    return decode_rows(
      network,
      params,
      keys,
      last,
      problems.lengths,
      prefix,
      num_rows=args.children,
      max_new_tokens=args.new,
      stop_ids=(),
      eos_id=2,
      pad_id=0,
      controls=make_controls(),
    ).tokens

  def inputs(seed):
    shape = (args.prompts, args.children)
    keys = jax.random.split(jax.random.key(seed), shape)
    return params, keys, draw_problems(seed, args)

  return measure(program, inputs, now)


def measure_search(network, params, args, now):
  """A whole search."""
  model = fixed_step_model(
    network,
    num_candidates=args.children,
    step_tokens=args.step,
    max_depth=args.depth,
    memory="tree",
  )
  program = run_on_device(mcts(model, num_simulations=args.simulations))

  def inputs(seed):
    return params, jax.random.key(seed), draw_problems(seed, args)

  return measure(program, inputs, now)


def measure_update(network, params, args, now):
  """One update of the learner."""
  optimizer = make_optimizer(learning_rate=1e-3)
  program = make_update(
    functools.partial(next_token_log_probs, network),
    optimizer,
    objective=Objective(),
    num_microbatches=2,
  )

  def inputs(seed):
    length = args.prompt + args.new
    shape = (args.prompts, length)
    lengths = np.random.default_rng(seed).integers(2, length, args.prompts)
    ones = jnp.ones(shape)
    return make_state(params, optimizer), LearnerBatch(
      tokens=jax.random.randint(jax.random.key(seed), shape, 1, 60, "int32"),
      lengths=jnp.asarray(lengths, jnp.int32),
      policy_weights=ones,
      value_targets=ones,
      value_weights=ones,
    )

  return measure(program, inputs, now)


def measure_generate(network, params, args, now):
  """The generator is several small programs; what its first call costs more."""
  generate = make_generate(
    network,
    num_rows=args.children,
    max_new_tokens=args.new,
    eos_id=-1,  # no token: each call meets the same sizes
    pad_id=0,
  )

  def call(seed):
    problems = draw_problems(seed, args)
    shape = (args.prompts, args.children)
    keys = jax.random.split(jax.random.key(seed), shape)
    clock, begin = Clock(), now()
    generate(params, keys, problems.tokens, problems.lengths, make_controls())
    return now() - begin, clock.compilation()

  first, _ = call(0)
  second, again = call(1)
  return {
    "lower_s": "",
    "compile_s": round(first - second, 2),
    "again_s": round(again, 2),
  }


PROGRAMS = {
  "rows": measure_rows,
  "search": measure_search,
  "update": measure_update,
  "generate": measure_generate,
}


def main(argv=None):
  parser = common.make_parser(__doc__, repeats=None)
  parser.add_argument("--sizes", default="S,S8")
  parser.add_argument("--programs", default=",".join(PROGRAMS))
  parser.add_argument("--prompts", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--children", type=int, default=4)
  parser.add_argument("--new", type=int, default=128)
  parser.add_argument("--step", type=int, default=16)
  parser.add_argument("--depth", type=int, default=8)
  parser.add_argument("--simulations", type=int, default=64)
  args = parser.parse_args(argv)
  common.start(args.clock)
  jax.config.update("jax_enable_compilation_cache", False)
  now = time.process_time if args.clock == "cpu" else time.perf_counter
  report = common.Report("compile_times", args.clock)
  for size in args.sizes.split(","):
    network, params = common.random_network(size)
    for name in args.programs.split(","):
      seconds = PROGRAMS[name](network, params, args, now)
      report.add(size=size, name=name, **seconds)
  report.close()


if __name__ == "__main__":
  main()
