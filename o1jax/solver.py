"""From problems to searched and scored solutions: the stations every command
shares.

  encode      problems as a ProblemBatch, prompts padded to one length
  search      one strategy on the mesh; with the checker as reward it is stepped
              from the host, else it is one compiled loop
  read        the trees back on the host, every finished solution as text
  score       the checker's verdict on each

A search uses the checker only where the config says that the checker is its
reward; its requests are then counted as the search's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from o1jax import jsonl, node_store
from o1jax import mesh as mesh_lib
from o1jax import step_model as step_model_lib
from o1jax.policy import sample
from o1jax.policy.network import Network
from o1jax.policy.tokenizer import Tokenizer
from o1jax.reward.outcome import Verifier
from o1jax.search import contracts, driver, strategies, voting
from o1jax.search.guidance import Guidance
from o1jax.search.tree import NO_NODE, ROOT
from o1jax.tasks.task import Task
from o1jax.types import Problem, ProblemBatch

REWARDS = ("checker", "value")
Watch = Callable[[list[str]], None]
# Strategies whose candidates are whole solutions, the last by temperature 0.
WHOLE = ("best_of_n", "majority_vote", "greedy")
# Those whose candidates are revisions of whole solutions.
REVISIONS = ("revision", "mctsr")
# Those that sample candidates side by side, so that equal ones stay apart.
SIDE_BY_SIDE = ("speculative_rejection", "revision")
STRATEGIES = (*strategies.STRATEGIES, "majority_vote")
# What a step of the other strategies is: see `_step_shape`.
GRANULARITIES = ("step", "segment", "token")


class Lengths(NamedTuple):
  """Shapes that follow from the task's format.

  Attributes:
    prompt_tokens: P, positions of a prompt.
    step_tokens: S, tokens of one step, its end included.
    num_steps: steps of a solution.
    row_tokens: T, positions of a row that is learned from: prompt and solution.
    reflection_tokens: the same of rows with judgements or revisions, which are
      longer; 0 for `row_tokens`.
  """

  prompt_tokens: int
  step_tokens: int
  num_steps: int
  row_tokens: int
  reflection_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Policy:
  """What searches and learns: a network with its tokenizer and its shapes."""

  network: Network
  tokenizer: Tokenizer
  lengths: Lengths

  def encode_solution(self, text: str) -> list[int]:
    """Tokens of a solution, end mark included."""
    return [*self.tokenizer.encode(text), self.tokenizer.eos_id]


@dataclasses.dataclass(frozen=True)
class FoundSolution:
  """One finished solution of a search.

  In a tree of revisions tokens and log-probs are those of all answers on the
  path, and `text` is the last one's.

  Attributes:
    node: index of its last step in the tree.
    text: without the end mark; of revisions the last answer alone.
    path: indices of its steps, first step first.
    tokens: `[T]`, end mark included where there is one.
    behavior_log_probs: `[T]` under the distribution drawn from.
    policy_log_probs: `[T]` under the policy itself.
    is_finished: True where it ends with the end mark.
    outcome: the search's own estimate: checked reward, or value.
    num_visits: visits of the last node.
  """

  node: int
  text: str
  path: tuple[int, ...]
  tokens: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  is_finished: bool
  outcome: float
  num_visits: int


@dataclasses.dataclass(frozen=True)
class Searched:
  """What a search did for one problem.

  Attributes:
    problem: the problem.
    solutions: every finished solution of the tree, by node.
    selected: index in `solutions` of the one answered with; None if there is
      none.
    nodes: arrays `[N]` of the tree and `[N, S]` of its steps by name, and
      `texts`, the steps as text.
    cost: generated_tokens, forward_tokens, simulations, verifier_requests,
      verifier_distinct.
  """

  problem: Problem
  solutions: Sequence[FoundSolution]
  selected: int | None
  nodes: Mapping[str, Any]
  cost: Mapping[str, int]


def problem_seed(problem: Problem) -> int:
  """Returns a fixed 32-bit hash of the problem's id (FNV-1a)."""
  value = 2166136261
  for byte in problem.id.encode():
    value = (value ^ byte) * 16777619 % 2**32
  return value


def encode_problems(
  policy: Policy, problems: Sequence[Problem]
) -> ProblemBatch:
  """Problems as arrays.

  Raises:
    ValueError: a prompt is longer than P.
  """
  encoded = policy.tokenizer.encode_batch([p.prompt for p in problems])
  width = policy.lengths.prompt_tokens
  for problem, ids in zip(problems, encoded, strict=True):
    if len(ids) > width:
      raise ValueError(
        f"the prompt of {problem.id} has {len(ids)} tokens, more than "
        f"lengths.prompt_tokens={width}: raise it"
      )
  tokens = np.full((len(problems), width), policy.tokenizer.pad_id, np.int32)
  for row, ids in zip(tokens, encoded, strict=True):
    row[: len(ids)] = ids
  return ProblemBatch(
    tokens=tokens,
    lengths=np.array([len(ids) for ids in encoded], np.int32),
    seeds=np.array([problem_seed(p) for p in problems], np.uint32),
  )


class Solver:
  """One search strategy, compiled once for one batch size.

  Attributes:
    strategy: the search, not yet on the mesh.
    batch_size: problems searched at a time.
  """

  def __init__(
    self,
    policy: Policy,
    *,
    strategy: str,
    batch_size: int,
    mesh: Mesh,
    task: Task,
    reward: str = "value",
    guidance: Mapping[str, float] | None = None,
    guidance_functions: Mapping[str, Guidance] | None = None,
    num_workers: int = 0,
    granularity: str = "step",
    num_revisions: int = 3,
    num_candidates: int = 1,
    num_simulations: int = 1,
    num_expansions: int = 1,
    num_parallel_leaves: int = 1,
    virtual_loss: float = 1.0,
    discount: float = 1.0,
    rule: str = "puct",
    rule_options: Mapping[str, Any] | None = None,
    select_by: str = "outcome",
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_rollouts: int = 0,
    rollout_weight: float = 0.0,
    memory: str = "tree",
    steps_from_host: bool = False,
  ):
    """Builds the programs; nothing compiles before the first call.

    Args:
      policy: what proposes.
      strategy: "majority_vote", or a name of search/strategies.py.
      batch_size: problems searched at a time; shorter lists are padded.
      mesh: problems are shared out over its data and fsdp axes.
      task: its checker is the reward, and it reads the answers that vote.
      reward: what judges a finished solution: "checker", or "value" for the
        guidance's own score.
      guidance: weights by name of what scores candidates, see
        search/guidance.py; None for the value head alone.
      guidance_functions: guidances of one's own by name.
      num_workers: processes to check in; 0 checks in this one. With processes
        a batch is searched as two halves, where these divide over the mesh:
        the device works on one while the texts of the other are checked.
      granularity: of strategies that do not draw whole solutions: "step", a
        line; "segment", as many tokens as a line may have; "token", the
        likeliest tokens, one each.
      num_revisions: of revision and mctsr, most revisions behind each other;
        the policy writes a line of criticism before each.
      num_candidates: A, or N for best-of-N and majority vote.
      num_simulations: of mcts.
      num_expansions: most nodes that a search expands; bounds its memory.
      num_parallel_leaves: W, expansions per tree and round.
      virtual_loss: taken from paths that wait, where W is above 1.
      discount: of the return of mcts, per step.
      rule: selection rule of mcts.
      rule_options: its constants, such as `dirichlet_fraction` of puct; those
        left out keep their defaults, see search/selection.py.
      select_by: how mcts answers, "outcome" or "visits".
      options: more keyword options of the strategy, such as `max_blocks` of
        mcts or `max_tokens`; see its file in search/.
      temperature, top_k, top_p, min_p: how candidates are sampled.
      num_rollouts: continuations of every candidate of mcts.
      rollout_weight: weight of the rollouts in a candidate's value.
      memory: "tree" or "tokens"; see `step_model`.
      steps_from_host: step the search from the host even where the reward does
        not need it, so that it can be watched.

    Raises:
      ValueError: a field that does not fit, with what to change.
    """
    if strategy not in STRATEGIES:
      raise ValueError(
        f"strategy={strategy!r}: choose one of {', '.join(STRATEGIES)}"
      )
    if granularity not in GRANULARITIES:
      raise ValueError(
        f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}"
      )
    if reward not in REWARDS:
      raise ValueError(f"reward={reward!r}: choose one of {', '.join(REWARDS)}")
    if bool(rollout_weight) != bool(num_rollouts):
      raise ValueError(
        f"num_rollouts={num_rollouts} and rollout_weight={rollout_weight}: set "
        "both above 0, or both to 0"
      )
    mesh_lib.check_divides("batch_size", batch_size, mesh)
    self.batch_size = batch_size
    self._policy = policy
    self._task = task
    self._verifier = None
    if reward == "checker":
      self._verifier = Verifier(task.check, num_workers=num_workers)
    _check_combination(strategy, granularity, reward, guidance, num_rollouts)
    self._votes = strategy == "majority_vote"
    is_tree = strategy not in WHOLE
    self._revises = strategy in REVISIONS
    if self._revises:
      shape = _revision_shape(policy, task, num_revisions)
    else:
      shape = _step_shape(policy, granularity if is_tree else "solution")
    self._max_depth = shape["max_depth"]
    model = step_model_lib.make_step_model(
      policy.network,
      num_candidates=num_candidates if strategy != "greedy" else 1,
      eos_id=policy.tokenizer.eos_id,
      pad_id=policy.tokenizer.pad_id,
      controls=sample.make_controls(
        temperature=temperature if strategy != "greedy" else 0.0,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
      ),
      memory=memory,
      merge_duplicates=is_tree and strategy not in SIDE_BY_SIDE,
      num_rollouts=num_rollouts if is_tree else 0,
      guidance=guidance,
      guidance_functions=guidance_functions,
      **shape,
    )
    shared = dict(
      num_simulations=num_simulations,
      num_expansions=num_expansions,
      num_revisions=num_revisions,
      capacity=1 + num_candidates * num_expansions,
      max_depth=self._max_depth,
      rule=rule,
      rule_options=rule_options,
      num_parallel_leaves=num_parallel_leaves,
      virtual_loss=virtual_loss,
      discount=discount,
      rollout_weight=rollout_weight,
      select_by=select_by,
    )
    name = "best_of_n" if self._votes else strategy
    taken = strategies.option_names(name)
    strategy_options = {n: shared[n] for n in taken if n in shared}
    strategy_options |= options or {}
    if granularity == "token":
      _check_single_expansion(strategy_options)
    self.strategy = strategies.make_strategy(name, model, **strategy_options)
    on_mesh = over_mesh(self.strategy, mesh)
    self._select = jax.jit(on_mesh.select)
    self._read_children = jax.jit(
      functools.partial(_children_tokens, max_depth=self._max_depth)
    )
    # Two halves, where the device would wait for other processes' verdicts.
    is_split = self._verifier is not None and num_workers > 0
    ways = 2 * mesh_lib.batch_ways(mesh)
    self._num_parts = 2 if is_split and batch_size % ways == 0 else 1
    if self._verifier is not None or steps_from_host:
      self._search = driver.run_with_host(on_mesh, self._outcomes)
    else:
      search = driver.run_on_device(on_mesh)
      self._search = lambda params, key, batches: [
        search(params, key, batch) for batch in batches
      ]
    self._mesh = mesh
    # Of the batch being searched: its problems, and texts checked for each.
    self._problems: Sequence[Problem] = ()
    self._asked: list[list[str]] = []
    self._watch: Watch | None = None

  def close(self) -> None:
    """Ends the processes that check."""
    if self._verifier is not None:
      self._verifier.close()

  def __call__(
    self,
    params: Any,
    key: jax.Array,
    problems: Sequence[Problem],
    *,
    watch: Watch | None = None,
  ) -> list[Searched]:
    """Searches every problem.

    Args:
      params: of the network.
      key: typed key; each problem derives its own from it and its id.
      problems: any number of them.
      watch: called after every round with the texts that the first problem's
        expansion reached; needs a search that is stepped from the host.
    """
    self._watch = watch
    found: list[Searched] = []
    for start in range(0, len(problems), self.batch_size):
      chunk = problems[start : start + self.batch_size]
      padded = [*chunk, *[chunk[0]] * (self.batch_size - len(chunk))]
      found.extend(self._search_batch(params, key, padded, len(chunk)))
    return found

  def _search_batch(self, params, key, problems, count) -> list[Searched]:
    self._problems = problems[:count]
    self._asked = [[] for _ in problems]
    size = self.batch_size // self._num_parts
    batches = [
      mesh_lib.shard_batch(
        encode_problems(self._policy, problems[start : start + size]),
        self._mesh,
      )
      for start in range(0, self.batch_size, size)
    ]
    parts = [
      jax.device_get((_host_fields(state), self._select(state), state.cost))
      for state in self._search(params, key, batches)
    ]
    fields, selected, cost = jax.tree.map(
      lambda *arrays: np.concatenate(arrays), *parts
    )
    searched = []
    for i in range(count):
      nodes = {name: array[i] for name, array in fields.items()}
      solutions = self._read_solutions(nodes)
      spent = {
        "generated_tokens": int(cost.generated_tokens[i]),
        "forward_tokens": int(cost.forward_tokens[i]),
        "simulations": int(cost.simulations[i]),
        "verifier_requests": len(self._asked[i]),
        "verifier_distinct": len(set(self._asked[i])),
      }
      if self._votes:
        chosen = self._vote(problems[i], solutions)
      else:
        index = {solution.node: j for j, solution in enumerate(solutions)}
        chosen = index[int(selected[i])] if selected[i] != NO_NODE else None
      searched.append(Searched(problems[i], solutions, chosen, nodes, spent))
    return searched

  def _vote(self, problem, solutions) -> int | None:
    """The first solution with the answer that most solutions give."""
    answers = [
      self._task.check(problem, s.text).answer if s.is_finished else None
      for s in solutions
    ]
    winner = voting.vote(answers)
    return None if winner is None else answers.index(winner)

  def _read_solutions(self, nodes: dict[str, Any]) -> list[FoundSolution]:
    """Every finished solution of one tree; adds the steps' texts to `nodes`."""
    lengths, parent = nodes["lengths"], nodes["parent"]
    decode = self._policy.tokenizer.decode
    spans = [nodes["tokens"][n, : lengths[n]] for n in range(len(lengths))]
    nodes["texts"] = [decode(span.tolist()) for span in spans]
    solutions = []
    is_end = nodes["is_terminal"] | nodes["is_solution"]
    for node in np.flatnonzero(is_end & nodes["is_valid"]):
      path, at = [], int(node)
      while at != ROOT:
        path.append(at)
        at = int(parent[at])
      path.reverse()
      logs = {
        name: np.concatenate([nodes[name][n, : lengths[n]] for n in path])
        for name in ("behavior_log_probs", "policy_log_probs")
      }
      solutions.append(
        FoundSolution(
          node=int(node),
          text=self._answer("".join(nodes["texts"][n] for n in path)),
          path=tuple(path),
          tokens=np.concatenate([spans[n] for n in path]),
          is_finished=bool(nodes["is_finished"][node]),
          outcome=float(nodes["reward"][node] + nodes["value"][node]),
          num_visits=int(nodes["num_visits"][node]),
          **logs,
        )
      )
    return solutions

  def _outcomes(
    self, state: contracts.SearchState, part: int
  ) -> np.ndarray | None:
    """Checked outcomes `[B, W, A]` of new finished candidates, else NaN."""
    tokens, mask, is_new, is_open, rollouts, is_rolled = jax.device_get(
      self._read_children(state)
    )
    if self._watch is not None and part == 0:
      new = zip(tokens[0][is_new[0]], mask[0][is_new[0]], strict=True)
      self._watch([self._text(row[is_token]) for row, is_token in new])
    if self._verifier is None:
      return None
    outcome = np.full(is_open.shape, np.nan, np.float32)
    first = part * len(outcome)
    # Rows that only fill the batch are nobody's cost.
    is_real = first + np.arange(len(outcome)) < len(self._problems)
    is_open = is_open & is_real[:, None, None]
    is_rolled = is_rolled & is_real[:, None, None]
    asked, texts = [], []
    for b, w, a in zip(*np.nonzero(is_open), strict=True):
      texts.append(self._text(tokens[b, w, a][mask[b, w, a]]))
      asked.append((b, w, a))
    for b, w, a in zip(*np.nonzero(is_rolled), strict=True):
      outcome[b, w, a] = 0.0
      start = tokens[b, w, a][mask[b, w, a]]
      for rollout in rollouts[b, w, a]:
        # One that was cut off has no answer.
        if self._policy.tokenizer.eos_id in rollout:
          texts.append(self._text(np.concatenate([start, rollout])))
          asked.append((b, w, a))
    problems = [self._problems[first + b] for b, _, _ in asked]
    for (b, _, _), text in zip(asked, texts, strict=True):
      self._asked[first + b].append(text)
    verdicts = self._verifier.check(problems, texts)
    share = 1.0 / max(rollouts.shape[3], 1)
    for (b, w, a), verdict in zip(asked, verdicts, strict=True):
      if is_open[b, w, a]:
        outcome[b, w, a] = float(verdict.is_correct)
      else:
        outcome[b, w, a] += share * verdict.is_correct
    return outcome

  def _text(self, tokens: np.ndarray) -> str:
    return self._answer(self._policy.tokenizer.decode(tokens.tolist()))

  def _answer(self, text: str) -> str:
    """The solution that a path ends with."""
    return self._task.final_solution(text) if self._revises else text


def _check_combination(
  strategy: str,
  granularity: str,
  reward: str,
  guidance: Mapping[str, float] | None,
  num_rollouts: int,
) -> None:
  """Refuses what does not go together, with the reason.

  Raises:
    ValueError: two fields of which one must change.
  """
  name = "best_of_n" if strategy == "majority_vote" else strategy
  if num_rollouts and "rollout_weight" not in strategies.option_names(name):
    raise ValueError(
      f"num_rollouts={num_rollouts}: strategy={strategy!r} does not read "
      "rollouts; set num_rollouts and rollout_weight to 0"
    )
  if granularity == "token" and strategy in (
    "speculative_rejection",
    "treebon",
  ):
    raise ValueError(
      f"granularity='token': strategy={strategy!r} begins many solutions at "
      "the root, which the likeliest tokens would make equal; use step or "
      "segment"
    )
  if guidance is not None and guidance.get("log_prob"):
    for field, value, what in (
      ("reward", reward, "checker"),
      ("strategy", strategy, "mctsr"),
      ("num_rollouts", bool(num_rollouts), True),
    ):
      if value == what:
        raise ValueError(
          f"guidance.log_prob with {field}={value!r}: a log-prob is below any "
          "outcome; use guidance.mean_prob, which is in [0, 1]"
        )


def _check_single_expansion(options: Mapping[str, Any]) -> None:
  """A node of tokens expands once: another time shows the same tokens."""
  for name in ("max_blocks", "num_root_blocks"):
    if options.get(name, 1) != 1:
      raise ValueError(
        f"granularity='token': {name}={options[name]} would expand a node "
        "again, to the same likeliest tokens; set it to 1"
      )


def _step_shape(policy: Policy, granularity: str) -> dict[str, Any]:
  """Arguments of `make_step_model` that make a step what it is."""
  lengths, newline = policy.lengths, policy.tokenizer.newline_id
  num_tokens = lengths.step_tokens * lengths.num_steps
  if granularity == "solution":
    return dict(max_step_tokens=num_tokens, max_depth=1, stop_ids=())
  if granularity == "token":
    return dict(
      max_step_tokens=1,
      max_depth=num_tokens,
      stop_ids=(),
      goes_on_where_cut=True,
      enumerates=True,
    )
  return dict(
    max_step_tokens=lengths.step_tokens,
    max_depth=lengths.num_steps,
    stop_ids=(newline,) if granularity == "step" else (),
    goes_on_where_cut=granularity == "segment",
  )


def _revision_shape(
  policy: Policy, task: Task, num_revisions: int
) -> dict[str, Any]:
  """Arguments of `make_step_model` for answers and their revisions.

  A step holds the mark, a line of criticism and a solution.
  """
  if num_revisions < 0:
    raise ValueError(f"num_revisions={num_revisions} must be 0 or more")
  opening = tuple(policy.tokenizer.encode(f"\n{task.revision_mark}"))
  lengths = policy.lengths
  num_lines = lengths.num_steps + 1
  return dict(
    max_step_tokens=len(opening) + lengths.step_tokens * num_lines,
    max_depth=1 + num_revisions,
    stop_ids=(),
    opening=opening,
  )


def over_mesh(strategy: contracts.Strategy, mesh: Mesh) -> contracts.Strategy:
  """The strategy with problems shared out over the mesh.

  Every device searches its own problems in loops of its own: nothing is
  exchanged within a round, and rounds go on until all devices are done.
  Parameters are whole on each of them.
  """
  batch = PartitionSpec(mesh_lib.TABLE["batch"])
  whole = PartitionSpec()

  def spread(fn, *in_specs):
    return jax.shard_map(
      fn, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False
    )

  def absorb(state, outcome=None):
    if outcome is None:
      return spread(strategy.absorb, batch)(state)
    return spread(strategy.absorb, batch, batch)(state, outcome)

  return strategy._replace(
    init=spread(strategy.init, whole, whole, batch),
    propose=spread(strategy.propose, whole, batch),
    absorb=absorb,
    is_done=spread(strategy.is_done, batch),
    select=spread(strategy.select, batch),
  )


def step_weights(searched: Searched) -> dict[int, np.ndarray]:
  """Weights of the AlphaGo Zero loss for each finished solution, by node.

  The weight of a step is its share of its siblings' visits. A step that several
  finished solutions share is carried by the first of them, so that each edge of
  the tree counts once. Steps that were visited but lead to no finished solution
  are in no row; their share is left out.
  """
  nodes = searched.nodes
  visits, parent = nodes["num_visits"], nodes["parent"]
  totals: dict[int, int] = {}
  for child in np.flatnonzero(nodes["is_valid"] & (nodes["depth"] > 0)):
    above = int(parent[child])
    totals[above] = totals.get(above, 0) + int(visits[child])
  carried: set[int] = set()
  weights = {}
  for solution in searched.solutions:
    if not solution.is_finished:
      continue  # It was cut off and is not learned from.
    spans = []
    for node in solution.path:
      share = 0.0
      if node not in carried:
        share = int(visits[node]) / max(totals[int(parent[node])], 1)
        carried.add(node)
      spans.append(np.full(nodes["lengths"][node], share, np.float32))
    weights[solution.node] = np.concatenate(spans)
  return weights


def tree_record(
  searched: Searched, is_correct: Mapping[int, bool], iteration: int
) -> dict[str, Any]:
  """A tree as `jsonl.write_trees` takes it, without unused and merged nodes.

  Args:
    searched: the search.
    is_correct: the checker's judgement by node, where there is one.
    iteration: written along.
  """
  nodes = searched.nodes
  kept = np.flatnonzero(nodes["is_valid"]).tolist()
  new_index = {old: new for new, old in enumerate(kept)}
  rows = []
  for old in kept:
    rows.append(
      {
        "parent": new_index[int(nodes["parent"][old])] if old != ROOT else -1,
        "text": nodes["texts"][old].rstrip("\n"),
        "num_visits": int(nodes["num_visits"][old]),
        "value": float(nodes["mean_value"][old] + nodes["reward"][old]),
        "prior": float(np.exp(nodes["prior_logits"][old])) if old else 1.0,
        "reward": float(nodes["reward"][old]),
        "is_terminal": bool(nodes["is_terminal"][old]),
        "is_correct": is_correct[old] if old in is_correct else None,
      }
    )
  return {
    "problem": jsonl.problem_row(searched.problem),
    "iteration": iteration,
    "nodes": rows,
  }


_TREE_FIELDS = (
  "parent",
  "depth",
  "first_child",
  "num_visits",
  "mean_value",
  "value",
  "reward",
  "prior_logits",
  "is_terminal",
  "is_solution",
  "is_valid",
)
_STORE_FIELDS = (
  "tokens",
  "lengths",
  "is_finished",
  "behavior_log_probs",
  "policy_log_probs",
)


def _host_fields(state: contracts.SearchState) -> dict[str, jax.Array]:
  """What the host reads of a search; keys and values stay on the device."""
  num_nodes = state.tree.parent.shape[1]
  fields = {name: getattr(state.tree, name) for name in _TREE_FIELDS}
  for name in _STORE_FIELDS:
    fields[name] = getattr(state.node_state, name)[:, :num_nodes]
  return fields


def _children_tokens(state: contracts.SearchState, *, max_depth: int):
  """Texts of new candidates, as tokens.

  Returns:
    tokens and mask `[B, W, A, R * S]` of the way from the root; which
    candidates are valid and new, and which of these are finished, `[B, W, A]`
    each; rollouts `[B, W, A, M, T]`; and which candidates have rollouts.
  """
  store, expansion = state.node_state, state.expansion
  trees, leaves, candidates = expansion.is_valid.shape
  row = jnp.arange(trees)[:, None]
  actions = jnp.arange(candidates)[None, None]
  node = (state.first_child[..., None] + actions).reshape(trees, -1)
  path = node_store.path_to(store, node, max_depth)
  tokens, mask = node_store.path_tokens(store, path)
  shape = (trees, leaves, candidates)
  is_new = expansion.is_valid & state.is_expanding[..., None]
  is_finished = store.is_finished[row, node].reshape(shape)
  rollouts = store.rollout_tokens[row, node]
  is_rolled = is_new & ~expansion.is_terminal & (rollouts.shape[2] > 0)
  return (
    tokens.reshape(*shape, -1),
    mask.reshape(*shape, -1),
    is_new,
    is_new & is_finished,
    rollouts.reshape(*shape, *rollouts.shape[2:]),
    is_rolled,
  )
