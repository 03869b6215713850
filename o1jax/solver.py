"""From problems to searched and scored solutions: the stations every command
shares.

  encode      problems as a ProblemBatch, prompts padded to one length
  search      one strategy on the mesh; with the checker as reward it is stepped
              from the host, else it is one compiled loop
  read        the trees back on the host, every finished solution as text
  answer      with the solution that the strategy selects, or as answering.py
              has it

A search uses the checker only where the config says that the checker is its
reward; its requests are then counted as the search's own.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from o1jax import answering, combinations, step_shape
from o1jax import mesh as mesh_lib
from o1jax import searched as searched_lib
from o1jax import step_model as step_model_lib
from o1jax.encoding import Policy, encode_problems
from o1jax.feedback import Critic, take_in_feedback
from o1jax.judging import Judge, Watch
from o1jax.node_store import CacheOptions
from o1jax.policy import sample
from o1jax.policy.drafts import Draft
from o1jax.reward.outcome import Verifier
from o1jax.search import driver, strategies
from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.guidance import Guidance
from o1jax.search.host_guidance import (
  Classes,
  HostGuide,
  Readers,
  TextGuidance,
  split_weights,
)
from o1jax.search.selection import check_options
from o1jax.search.tree import NO_NODE
from o1jax.searched import Searched
from o1jax.self_evaluation import make_judgement
from o1jax.tasks.task import Task
from o1jax.types import Problem


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
    text_functions: Mapping[str, TextGuidance] | None = None,
    classes_fn: Classes | None = None,
    num_workers: int = 0,
    granularity: str = "step",
    num_revisions: int = 3,
    feedback: str = "policy",
    num_candidates: int = 1,
    num_simulations: int = 1,
    num_expansions: int = 1,
    num_parallel_leaves: int = 1,
    virtual_loss: float = 1.0,
    discount: float = 1.0,
    rule: str = "puct",
    rule_options: Mapping[str, Any] | None = None,
    select_by: str = "outcome",
    answer_by: str = "search",
    fold: str = "last",
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_rollouts: int = 0,
    rollout_weight: float = 0.0,
    memory: str = "tree",
    cache: Mapping[str, Any] | None = None,
    num_proposals: int = 0,
    draft: Draft = step_model_lib.LOOKUP,
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
        search/guidance.py and search/host_guidance.py; None for the value head
        alone.
      guidance_functions: guidances of one's own by name.
      text_functions: those that read texts, `(problem, texts) -> scores`, as
        outcome and process rewards do: texts are whole solutions and
        beginnings of them.
      classes_fn: `(problem, solutions) -> labels`, the classes of semantic
        entropy, such as `entailment.policy_classes`; None for the task's
        answers.
      num_workers: processes to check in; 0 checks in this one. With processes
        a batch is searched as two halves, where these divide over the mesh:
        the device works on one while the texts of the other are checked.
      granularity: of strategies that do not draw whole solutions: "step", a
        line; "segment", as many tokens as a line may have; "token", the
        likeliest tokens, one each.
      num_revisions: of revision and mctsr, most revisions behind each other;
        a line of criticism stands before each.
      feedback: who writes that line: the "policy" itself, or the "checker",
        whose message says what is wrong and in which step. So the search is
        told more than the policy knows: its accuracy is not one without the
        checker, whatever the reward. Each message counts as a request.
      num_candidates: A, or N for best-of-N and majority vote.
      num_simulations: of mcts.
      num_expansions: most nodes that a search expands; bounds its memory.
      num_parallel_leaves: W, expansions per tree and round.
      virtual_loss: taken from paths that wait, where W is above 1.
      discount: of the return of mcts, per step.
      rule: selection rule of mcts.
      rule_options: its constants, such as `dirichlet_fraction` of puct; those
        left out keep their defaults, see search/selection.py.
      select_by: how mcts selects, "outcome" or "visits".
      answer_by: which solution is answered with: "search", the one that the
        strategy selects; "score", "vote" or "weighted_vote", see answering.py.
      fold: how the scores of its steps make that of a solution: "last", "min",
        "product" or "mean".
      options: more keyword options of the strategy, such as `max_blocks` of
        mcts or `max_tokens`; see its file in search/. `stop_threshold` and
        `stop_patience` end a problem's search early, see search/stopping.py;
        not where the answer is by vote.
      temperature, top_k, top_p, min_p: how candidates are sampled.
      num_rollouts: continuations of every candidate, where something reads
        them.
      rollout_weight: of mcts and reroot, weight of the rollouts' outcomes in a
        candidate's value.
      memory: "tree" or "tokens"; see `step_model`.
      cache: fields of `node_store.CacheOptions` that make the tree memory
        smaller: `dtype`, `window`, `num_sinks`.
      num_proposals: tokens that the draft proposes for each call of the
        network; 0 decodes token by token. See `make_step_model`.
      draft: looks up what followed in the text, or a `ModelDraft`.
      steps_from_host: step the search from the host even where the reward does
        not need it, so that it can be watched.

    Raises:
      ValueError: a field that does not fit, with what to change.
    """
    combinations.check_combination(
      strategy,
      granularity,
      reward,
      guidance,
      num_rollouts,
      rollout_weight,
      feedback,
    )
    answering.check_answering(strategy, answer_by, fold, guidance)
    combinations.check_stop_rules(strategy, answer_by, options or {})
    check_options("the search's cache", CacheOptions, cache or {})
    on_device, on_host = split_weights(
      guidance, guidance_functions, text_functions
    )
    if on_host:
      combinations.check_says(strategy, reward, num_rollouts, guidance)
    mesh_lib.check_divides("batch_size", batch_size, mesh)
    self.batch_size = batch_size
    self._policy = policy
    self._task = task
    self._mesh = mesh
    is_checked = reward == "checker"
    self._verifier = Verifier(
      task.check, num_workers=num_workers if is_checked else 0
    )
    self._answer_by = "vote" if strategy == "majority_vote" else answer_by
    self._fold = fold
    self._revises = strategy in combinations.REVISIONS
    is_tree = strategy not in combinations.WHOLE
    shape = _step_shape(
      policy, task, strategy, granularity, num_revisions, feedback
    )
    judgement = None
    if guidance is not None and guidance.get("self_evaluation"):
      judgement = make_judgement(
        policy.tokenizer, policy.lengths, task.judge_mark, task.verdict_words
      )
    controls = sample.make_controls(
      temperature=temperature if strategy != "greedy" else 0.0,
      top_k=top_k,
      top_p=top_p,
      min_p=min_p,
    )
    model = step_model_lib.make_step_model(
      policy.network,
      shape,
      num_candidates=num_candidates if strategy != "greedy" else 1,
      eos_id=policy.tokenizer.eos_id,
      pad_id=policy.tokenizer.pad_id,
      controls=controls,
      memory=memory,
      cache=CacheOptions(**cache or {}),
      num_proposals=num_proposals,
      draft=draft,
      merge_duplicates=is_tree and strategy not in combinations.SIDE_BY_SIDE,
      num_rollouts=num_rollouts if is_tree else 0,
      guidance=on_device,
      guidance_functions=guidance_functions,
      judgement=judgement,
    )
    self.strategy = _make_strategy(
      strategy,
      model,
      granularity,
      options or {},
      num_simulations=num_simulations,
      num_expansions=num_expansions,
      num_revisions=num_revisions,
      capacity=1 + num_candidates * num_expansions,
      max_depth=shape.max_depth,
      rule=rule,
      rule_options=rule_options,
      num_parallel_leaves=num_parallel_leaves,
      virtual_loss=virtual_loss,
      discount=discount,
      rollout_weight=rollout_weight,
      select_by=select_by,
    )
    on_mesh = driver.over_mesh(self.strategy, mesh)
    self._select = jax.jit(on_mesh.select)
    # Two halves, where the device would wait for other processes' verdicts.
    is_split = is_checked and num_workers > 0
    ways = 2 * mesh_lib.batch_ways(mesh)
    self._num_parts = 2 if is_split and batch_size % ways == 0 else 1
    guide = critic = None
    if on_host:
      guide = self._host_guide(
        on_host, on_device, text_functions, classes_fn, is_checked
      )
    if feedback == "checker":
      critic = Critic(task.feedback, policy.tokenizer, shape.feedback_tokens)
    self._judge = Judge(
      lambda tokens: self._answer(policy.tokenizer.decode(tokens.tolist())),
      eos_id=policy.tokenizer.eos_id,
      max_depth=shape.max_depth,
      verifier=self._verifier if is_checked else None,
      checks_rollouts=rollout_weight > 0,
      guide=guide,
      critic=critic,
    )
    if is_checked or on_host or critic or steps_from_host:
      take_in = take_in_feedback if critic else driver.take_in
      self._search = driver.run_with_host(on_mesh, self._judge, take_in)
    else:
      search = driver.run_on_device(on_mesh)
      self._search = lambda params, key, batches: [
        search(params, key, batch) for batch in batches
      ]

  def close(self) -> None:
    """Ends the processes that check."""
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
    found: list[Searched] = []
    for start in range(0, len(problems), self.batch_size):
      batch = problems[start : start + self.batch_size]
      self._judge.begin(batch, watch)
      nodes, selected, cost = self._search_batch(params, key, batch)
      for i, problem in enumerate(batch):
        found.append(
          self._read(
            problem,
            {name: array[i] for name, array in nodes.items()},
            int(selected[i]),
            {name: int(spent[i]) for name, spent in vars(cost).items()}
            | _requests(self._judge.asked[i]),
          )
        )
    return found

  def _search_batch(self, params, key, problems):
    """Arrays of the trees, selected nodes and costs, rows first.

    A short batch is filled up with its first problem.
    """
    missing = self.batch_size - len(problems)
    padded = [*problems, *[problems[0]] * missing]
    size = self.batch_size // self._num_parts
    batches = [
      mesh_lib.shard_batch(
        encode_problems(self._policy, padded[start : start + size]), self._mesh
      )
      for start in range(0, self.batch_size, size)
    ]
    parts = [
      jax.device_get(
        (searched_lib.host_fields(state), self._select(state), state.cost)
      )
      for state in self._search(params, key, batches)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

  def _read(self, problem, nodes, selected, cost) -> Searched:
    """One problem's search as texts, with the solution answered with."""
    solutions = searched_lib.read_solutions(
      nodes, self._policy.tokenizer.decode, self._answer
    )
    if self._answer_by == "search":
      index = {solution.node: j for j, solution in enumerate(solutions)}
      chosen = index[selected] if selected != NO_NODE else None
    else:
      chosen = answering.choose(
        solutions,
        [answering.folded_score(nodes, s, self._fold) for s in solutions],
        functools.partial(self._read_answers, problem),
        self._answer_by,
      )
    return Searched(problem, solutions, chosen, nodes, cost)

  def _host_guide(
    self, on_host, on_device, text_functions, classes_fn, is_checked
  ) -> HostGuide:
    """The guidances of the host, with their share beside the device's."""
    answers_fn = self._read_answers
    return HostGuide(
      on_host,
      sum(on_device.values()) if on_device else 0.0,
      Readers(self._task.heuristic, answers_fn, classes_fn or answers_fn),
      text_functions,
      is_checked=is_checked,
    )

  def _read_answers(
    self, problem: Problem, texts: Sequence[str]
  ) -> list[str | None]:
    """Answers in the task's normal form; whether they are right is not read."""
    verdicts = self._verifier.check([problem] * len(texts), texts)
    return [verdict.answer for verdict in verdicts]

  def _answer(self, text: str) -> str:
    """The solution that the text of a path ends with."""
    return self._task.final_solution(text) if self._revises else text


def _step_shape(
  policy, task, strategy, granularity, num_revisions, feedback
) -> step_shape.StepShape:
  """What a step of the strategy is."""
  if strategy in combinations.REVISIONS:
    mark = policy.tokenizer.encode(f"\n{task.revision_mark}")
    return step_shape.revisions(
      policy.lengths,
      tuple(mark),
      num_revisions=num_revisions,
      takes_feedback=feedback == "checker",
    )
  if strategy in combinations.WHOLE:
    return step_shape.whole_solutions(policy.lengths)
  return step_shape.parts_of_solutions(
    policy.lengths, granularity, delimiter_id=policy.tokenizer.newline_id
  )


def _make_strategy(
  strategy: str,
  model: StepModel,
  granularity: str,
  options: Mapping[str, Any],
  **shared: Any,
) -> Strategy:
  """The strategy with those of the shared options that it takes, and its own.

  Raises:
    ValueError: an option that is unknown, out of range or does not fit.
  """
  name = combinations.search_name(strategy)
  taken = strategies.option_names(name)
  options = {n: shared[n] for n in taken if n in shared} | options
  if granularity == "token":
    combinations.check_single_expansion(options)
  return strategies.make_strategy(name, model, **options)


def _requests(asked: Sequence[str]) -> dict[str, int]:
  return {
    "verifier_requests": len(asked),
    "verifier_distinct": len(set(asked)),
  }
