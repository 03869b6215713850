"""Where policy meets search: candidate steps sampled from the policy.

A node of the tree is one step of the solution, a span of at most S tokens (see
`StepShape`). Expanding a node samples A candidates for the next step and reads
the value of each from its last token in the same pass. What the search hands
back as `node_state` is a `NodeStore`.

Two memories stand behind one seam (Section 5 of the paper; design of Hydragen,
arXiv 2402.05099, and of DeFT, arXiv 2404.00242):
  "tree"    a node keeps the keys and values of its own step only; an expansion
            gathers the blocks of the node's ancestors once and all A
            candidates attend to them;
  "tokens"  a node keeps its tokens only; every expansion reads prompt and path
            again. Slow and obvious: the reference for the tree memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.candidates import (
  Context,
  behind_candidates,
  merge_blocks,
  merge_into_siblings,
  named_keys,
  new_nodes,
  sampled_priors,
)
from o1jax.node_store import (
  CacheOptions,
  NodeStore,
  empty_store,
  gathered_context,
  merge_rows,
  path_to,
  path_tokens,
  recomputed_context,
  split_rows,
  step_memory,
  whole_texts,
  windowed,
  with_feedback,
  with_memory,
  write_nodes,
)
from o1jax.policy import cache as cache_lib
from o1jax.policy import sample
from o1jax.policy.drafts import Draft, NgramDraft
from o1jax.policy.network import Network
from o1jax.policy.speculative import check_draft, speculate_rows
from o1jax.search import contracts
from o1jax.search import guidance as guidance_lib
from o1jax.search.tree import ROOT
from o1jax.self_evaluation import Judgement, judge
from o1jax.step_shape import StepShape
from o1jax.types import ProblemBatch

MEMORIES = ("tree", "tokens")
WHOLE_CACHE = CacheOptions()
LOOKUP = NgramDraft()


def make_step_model(
  network: Network,
  shape: StepShape,
  *,
  num_candidates: int,
  eos_id: int,
  pad_id: int,
  controls: sample.SamplingControls,
  memory: str = "tree",
  cache: CacheOptions = WHOLE_CACHE,
  num_proposals: int = 0,
  draft: Draft = LOOKUP,
  merge_duplicates: bool = True,
  num_rollouts: int = 0,
  guidance: Mapping[str, float] | None = None,
  guidance_functions: Mapping[str, guidance_lib.Guidance] | None = None,
  judgement: Judgement | None = None,
) -> contracts.StepModel:
  """Builds the seam between a policy and a tree search.

  Args:
    network: the policy with its value head.
    shape: what a step is.
    num_candidates: A, candidates sampled at an expansion.
    eos_id: token that ends a solution.
    pad_id: fills a step after its end.
    controls: how candidates and rollouts are sampled.
    memory: "tree" or "tokens".
    cache: how much of keys and values is kept and read.
    num_proposals: K, tokens of a candidate that the draft proposes for each
      call of the network; 0 decodes candidates token by token. Candidates are
      drawn from the same distribution either way, with other numbers; see
      policy/speculative.py.
    draft: proposes; by default what followed the last tokens where they stood
      in the text before. The parameters of a `ModelDraft` become constants of
      the program.
    merge_duplicates: True keeps equal candidates of a node once, whichever of
      its expansions drew them, and corrects their prior for having been
      sampled; False keeps each (for votes).
    num_rollouts: M continuations sampled from every candidate to the end of
      the solution; the estimate of its outcome is the mean of their values. 0
      takes the guidance's score of the candidate itself.
    guidance: weights by name of what scores candidates; None for the value
      head. See search/guidance.py.
    guidance_functions: guidances of one's own by name.
    judgement: what the policy writes of a finished candidate, read by the
      guidance self_evaluation; its tokens are part of what a candidate costs.

  Returns:
    A `StepModel` whose `node_state` is a `NodeStore`.

  Raises:
    ValueError: an unknown memory, a size below 1, or what does not fit the
      shape, the memory or the network.
  """
  _check_memory(memory, cache)
  _check_counts(network, shape, num_candidates, num_rollouts)
  if num_proposals:
    _check_speculation(network, shape, draft, num_proposals)
  guidance = {"value": 1.0} if guidance is None else guidance
  guide, least_score = guidance_lib.weighted_mean(guidance, guidance_functions)
  reads_tokens = bool(guidance_functions) or any(
    guidance.get(name) for name in guidance_lib.OF_TOKENS
  )
  if not guidance.get("self_evaluation"):
    judgement = None
  elif judgement is None:
    raise ValueError(
      "guidance.self_evaluation needs a judgement: give its form"
    )
  model = _PolicySteps(
    network=windowed(network, cache),
    shape=shape,
    num_candidates=num_candidates,
    eos_id=eos_id,
    pad_id=pad_id,
    controls=controls,
    keeps_cache=memory == "tree",
    cache_dtype=cache.dtype,
    num_proposals=num_proposals,
    draft=draft,
    merges_duplicates=merge_duplicates,
    num_rollouts=num_rollouts,
    guide=guide,
    least_score=least_score,
    sums_certainty=reads_tokens,
    judgement=judgement,
  )
  most = shape.max_step_tokens + num_rollouts * shape.max_tokens_behind
  if judgement is not None:
    most += judgement.max_tokens
  return contracts.StepModel(num_candidates, model.root, model.step, most)


def _check_memory(memory, cache):
  if memory not in MEMORIES:
    raise ValueError(f"memory={memory!r}: choose one of {MEMORIES}")
  if memory == "tokens" and cache.dtype != "network":
    raise ValueError(
      f"memory='tokens' keeps no keys and values that could be {cache.dtype}: "
      "set the cache's dtype to 'network', or memory to 'tree'"
    )


def _check_counts(network, shape, num_candidates, num_rollouts):
  if num_candidates < 1:
    raise ValueError(f"num_candidates={num_candidates} must be at least 1")
  if num_rollouts and shape.max_depth == 1:
    raise ValueError("num_rollouts needs max_depth of 2 or more: set it to 0")
  if num_rollouts and shape.revises:
    raise ValueError(
      f"num_rollouts={num_rollouts} with an opening: nothing goes on behind a "
      "whole answer; set it to 0"
    )
  if shape.enumerates and num_candidates > network.config.vocab_size:
    raise ValueError(
      f"num_candidates={num_candidates} is more than the "
      f"{network.config.vocab_size} tokens to enumerate: lower it"
    )


def _check_speculation(network, shape, draft, num_proposals):
  check_draft(network, draft, num_proposals)
  if num_proposals >= shape.max_step_tokens:
    raise ValueError(
      f"num_proposals={num_proposals} is no less than the "
      f"{shape.max_step_tokens} tokens of a step: lower it, or set it to 0"
    )
  if shape.enumerates:
    raise ValueError(
      f"num_proposals={num_proposals}: the likeliest tokens are enumerated "
      "and not proposed; set it to 0"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _PolicySteps:
  """The functions of a `StepModel`, and the choices of `make_step_model`.

  A call of `step` goes: context of each node, candidates behind it, what the
  store keeps of them, which are valid and final, scores, rollouts.
  """

  network: Network
  shape: StepShape
  num_candidates: int
  eos_id: int
  pad_id: int
  controls: sample.SamplingControls
  keeps_cache: bool
  cache_dtype: str
  num_proposals: int
  draft: Draft
  merges_duplicates: bool
  num_rollouts: int
  guide: Callable[[guidance_lib.Signals], jax.Array]
  least_score: float
  sums_certainty: bool
  judgement: Judgement | None

  def root(
    self, params: Any, problems: ProblemBatch, capacity: int
  ) -> tuple[jax.Array, jax.Array, NodeStore]:
    """Reads the prompts; see `contracts.StepModel`."""
    prompt, last_hidden = cache_lib.prefix_from_prompt(
      self.network,
      params,
      problems.tokens,
      problems.lengths,
      cache_dtype=self.cache_dtype,
    )
    rollout_tokens = self.shape.max_tokens_behind if self.num_rollouts else 0
    store = empty_store(
      problems,
      capacity + self.num_candidates,
      self.shape.max_step_tokens,
      (self.num_rollouts, rollout_tokens),
      self.pad_id,
    )
    if self.sums_certainty:
      store = store.replace(confidence=store.log_prob, entropy=store.log_prob)
    if self.keeps_cache:
      store = with_memory(store, prompt, last_hidden)
    if self.shape.feedback_tokens:
      store = with_feedback(store, self.shape.feedback_tokens, self.pad_id)
    return self.network.value(params, last_hidden), problems.lengths, store

  def step(
    self,
    params: Any,
    keys: jax.Array,
    request: contracts.Request,
    store: NodeStore,
  ) -> tuple[contracts.Expansion, NodeStore]:
    """Samples candidates; see `contracts.StepModel`."""
    split = functools.partial(split_rows, shape=request.node.shape)
    step_keys, rollout_keys = named_keys(merge_rows(keys), self.num_candidates)
    context = self._read_context(params, request.node, store)
    rows = self._draw(params, step_keys, context, request, store)
    new = new_nodes(store, request.node, context.end, rows)
    if self.keeps_cache:
      new |= step_memory(rows, self.cache_dtype)
    is_terminal = self._is_terminal(split(rows.ended), split(rows.stopped))
    is_terminal |= split(new["depth"]) >= self.shape.max_depth
    is_valid, prior_logits, sibling_logits = self._priors(
      store, request, rows, split
    )
    generated = split(rows.lengths).sum((1, 2))
    evaluated = generated
    if self.num_proposals:
      # The network reads a token and those proposed behind it in each call.
      calls = split(rows.num_calls).sum((1, 2))
      evaluated = calls * (self.num_proposals + 1)
    signals = self._signals(params, rows, new, store)
    if self.judgement is not None:
      is_judged = merge_rows(is_valid) & rows.ended
      said, spent = self._judge(params, context, rows, is_judged)
      score = jnp.where(is_judged, said, signals.value)
      signals = signals.replace(self_evaluation=score)
      generated = generated + split(spent).sum((1, 2))
      evaluated = evaluated + split(spent).sum((1, 2))
    value, outcome = self._scores(signals, rows, is_terminal)
    if self.num_rollouts:
      is_open = merge_rows(is_valid & ~is_terminal)
      new["rollout_tokens"], mean_value, rolled = self._roll_out(
        params, rollout_keys, context, rows, is_open
      )
      outcome = jnp.where(is_terminal, outcome, split(mean_value))
      rolled = split(rolled).sum((1, 2))
      generated, evaluated = generated + rolled, evaluated + rolled
    is_active = request.num_rows > 0
    read = jnp.where(is_active, context.read_tokens, 0).sum(1)
    expansion = contracts.Expansion(
      prior_logits=prior_logits,
      is_valid=is_valid,
      is_terminal=is_terminal,
      is_solution=split(rows.ended),
      value=value,
      outcome=outcome,
      generated_tokens=generated,
      forward_tokens=evaluated + read,
      sibling_logits=sibling_logits,
    )
    new = jax.tree.map(split, new)
    return expansion, write_nodes(store, request.first_child, new)

  def _read_context(self, params, node, store) -> Context:
    """Gathers, or reads again, what stands before each node's candidates."""
    tree = jnp.arange(node.shape[0])[:, None]
    end = store.end_positions[tree, node]
    if self.shape.revises:
      end = end - store.is_finished[tree, node]
    path = path_to(store, node, self.shape.max_depth - 1)
    steps, is_step = path_tokens(store, path, with_ends=not self.shape.revises)
    text = whole_texts(store, steps, is_step) if self.num_proposals else None
    if self.keeps_cache:
      prefix, last_hidden = gathered_context(store, node, path, is_step)
      prefix = cache_lib.keep_window(
        prefix, merge_rows(end), self.network.config
      )
      return Context(prefix, last_hidden, merge_rows(end), 0, text)
    prefix, last_hidden, read_tokens = recomputed_context(
      self.network, params, store, steps, is_step
    )
    return Context(prefix, last_hidden, merge_rows(end), read_tokens, text)

  def _decode(self, params, keys, context, **options):
    """`sample.decode_rows` behind a context, drawn as the controls say.

    With a draft and the text of the context it takes fewer calls.
    """
    decode_rows = sample.decode_rows
    if context.text is not None:
      decode_rows = functools.partial(
        speculate_rows,
        draft=self.draft,
        num_proposals=self.num_proposals,
        context_tokens=context.text[0],
        context_lengths=context.text[1],
      )
    return decode_rows(
      self.network,
      params,
      keys,
      context.last_hidden,
      context.end,
      context.prefix,
      eos_id=self.eos_id,
      pad_id=self.pad_id,
      controls=self.controls,
      **options,
    )

  def _draw(self, params, keys, context, request, store):
    """The A candidates of each node, as `DecodedRows`."""
    index = jnp.arange(self.num_candidates)[None, None]
    return self._decode(
      params,
      keys,
      context,
      num_rows=self.num_candidates,
      max_new_tokens=self.shape.max_step_tokens,
      stop_ids=self.shape.stop_ids,
      is_active=merge_rows(index < request.num_rows[..., None]),
      with_certainty=self.sums_certainty,
      **self._first_tokens(params, context, request.node, store),
    )

  def _first_tokens(self, params, context, node, store):
    """Tokens that candidates are made to begin with; options of `_decode`."""
    if self.shape.enumerates:
      return self._likeliest(params, context.last_hidden)
    if self.shape.revises:
      tokens, lengths = self._revision_start(node, store)
      rows = (tokens.shape[0], self.num_candidates)
      return dict(
        forced_tokens=jnp.broadcast_to(
          tokens[:, None], (*rows, tokens.shape[1])
        ),
        forced_lengths=jnp.broadcast_to(lengths[:, None], rows),
      )
    return {}

  def _likeliest(self, params, last_hidden):
    """One of the A likeliest tokens each, as the policy's own choice."""
    logits = self.network.policy_logits(params, last_hidden)
    likeliest = jax.lax.top_k(logits, self.num_candidates)[1]
    return dict(
      forced_tokens=likeliest[..., None],
      forced_lengths=jnp.ones(likeliest.shape, jnp.int32),
      chosen=True,
    )

  def _revision_start(self, node, store):
    """Given text that begins the revisions of each node `[B, W]`.

    Returns:
      tokens `[B * W, F]`, and how many of them count `[B * W]`: none behind the
      prompt, where the first answer is written.
    """
    opening = jnp.array(self.shape.opening, jnp.int32)
    is_root = merge_rows(node == ROOT)
    tokens = jnp.broadcast_to(opening[None], (is_root.size, opening.size))
    lengths = jnp.full(is_root.shape, opening.size)
    if self.shape.feedback_tokens:
      tree = jnp.arange(node.shape[0])[:, None]
      feedback = merge_rows(store.feedback_tokens[tree, node])
      tokens = jnp.concatenate([tokens, feedback], axis=1)
      lengths += merge_rows(store.feedback_lengths[tree, node])
    return tokens, jnp.where(is_root, 0, lengths)

  def _is_terminal(self, ended, stopped):
    """Where nothing follows a candidate, but for its depth."""
    is_cut = ~(ended | stopped) & (not self.shape.goes_on_where_cut)
    return is_cut if self.shape.revises else is_cut | ended

  def _priors(self, store, request, rows, split):
    """Which candidates are valid, their priors, and what siblings gain."""
    is_valid, prior_logits = map(
      split, sampled_priors(rows, self.merges_duplicates)
    )
    if not (self.merges_duplicates and request.siblings.shape[-1]):
      return is_valid, prior_logits, None
    tokens = split(rows.tokens)
    if request.node.shape[1] > 1:
      is_valid, prior_logits = merge_blocks(
        request.node, tokens, is_valid, prior_logits
      )
    is_valid, sibling_logits = merge_into_siblings(
      store, request.node, request.siblings, tokens, is_valid, prior_logits
    )
    return is_valid, prior_logits, sibling_logits

  def _scores(self, signals, rows, is_terminal):
    """Value and outcome of every candidate, `[B, W, A]`."""
    value = self.guide(signals).reshape(is_terminal.shape)
    # A solution that was cut off has no answer, whatever its value says.
    has_answer = rows.ended.reshape(is_terminal.shape) | ~is_terminal
    return value, jnp.where(has_answer, value, self.least_score)

  def _signals(self, params, rows, new, store) -> guidance_lib.Signals:
    """What guidance may know of the candidates of each node, `[B * W, A]`.

    Of the tokens those count that the policy wrote, not those it was given.
    """
    num_leaves = rows.lengths.shape[0] // store.prompt_lengths.shape[0]
    prompt = jnp.repeat(store.prompt_lengths, num_leaves)[:, None]
    written = new["end_positions"] - prompt - self._num_given(new, store)
    return guidance_lib.Signals(
      value=self.network.value(params, rows.last_hidden),
      log_prob=new["log_prob"],
      num_tokens=jnp.maximum(written, 1),
      confidence=new.get("confidence"),
      entropy=new.get("entropy"),
      hidden=rows.last_hidden,
    )

  def _num_given(self, new, store):
    """Tokens of openings and feedback up to each candidate, `[B * W, A]`."""
    # An earlier answer's end mark was written, and has no position any more.
    num_given = len(self.shape.opening) - self.shape.revises
    openings = num_given * (new["depth"] - 1)
    if not self.shape.feedback_tokens:
      return openings
    num_trees = store.prompt_lengths.shape[0]
    node = new["parent"][:, 0].reshape(num_trees, -1)
    path = path_to(store, node, self.shape.max_depth - 1)
    tree = jnp.arange(num_trees)[:, None, None]
    lengths = store.feedback_lengths[tree, path].sum(-1)
    return openings + lengths.reshape(-1, 1)

  def _judge(self, params, context, rows, is_judged):
    """Has the policy judge finished candidates in writing.

    Returns:
      scores and tokens spent, `[B * W, A]` each.
    """
    behind = behind_candidates(context, rows, rows.lengths - rows.ended)
    score, spent = judge(
      self.network,
      params,
      self.judgement,
      behind.last_hidden,
      behind.end,
      behind.prefix,
      merge_rows(is_judged),
      eos_id=self.eos_id,
      pad_id=self.pad_id,
    )
    return score.reshape(is_judged.shape), spent.reshape(is_judged.shape)

  def _roll_out(self, params, keys, context, rows, is_open):
    """Samples M continuations of every open candidate to the end of the text.

    Returns:
      tokens `[B * W, A, M, T]`, mean value at the end `[B * W, A]` (0 for one
      that did not end) and tokens spent `[B * W, A]`.
    """
    split_keys = jax.vmap(lambda k: jax.random.split(k, self.num_rollouts))
    rolled = self._decode(
      params,
      split_keys(merge_rows(keys)),
      behind_candidates(context, rows, rows.lengths),
      num_rows=self.num_rollouts,
      max_new_tokens=self.shape.max_tokens_behind,
      stop_ids=(),
      is_active=jnp.repeat(
        merge_rows(is_open)[:, None], self.num_rollouts, axis=1
      ),
    )
    value = self.network.value(params, rolled.last_hidden)
    value = jnp.where(rolled.ended, value, 0.0).mean(1)
    back = functools.partial(split_rows, shape=(-1, self.num_candidates))
    return back(rolled.tokens), back(value), back(rolled.lengths.sum(1))
