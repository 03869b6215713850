"""Where policy meets search: candidate steps sampled from the policy.

A node of the tree is one step of the solution, a span of at most S tokens that
ends with the delimiter or with the end mark. Expanding a node samples A
candidates for the next step and reads the value of each from its last token in
the same pass. What the search hands back as `node_state` is a `NodeStore`.

Two memories stand behind one seam (Section 5 of the paper; design of Hydragen,
arXiv 2402.05099, and of DeFT, arXiv 2404.00242):
  "tree"    a node keeps the keys and values of its own step only; an expansion
            gathers the blocks of the node's ancestors once and all A
            candidates attend to them;
  "tokens"  a node keeps its tokens only; every expansion reads prompt and path
            again. Slow and obvious: the reference for the tree memory.

Granularity is the choice of delimiters, length and depth: steps (delimiter and
eos), whole solutions (eos alone, depth 1), segments or tokens (a fixed length
after which the next step goes on). With an opening, steps are whole solutions
that follow each other: a node is an answer and its children are revisions of
it, written behind all answers on the path without their end marks.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.node_store import (
  NodeStore,
  empty_store,
  gathered_context,
  merge_rows,
  path_to,
  path_tokens,
  recomputed_context,
  split_rows,
  with_memory,
  write_nodes,
)
from o1jax.policy import cache as cache_lib
from o1jax.policy import sample
from o1jax.policy.network import Network
from o1jax.search import contracts
from o1jax.search import guidance as guidance_lib
from o1jax.search.tree import NO_NODE, ROOT
from o1jax.types import ProblemBatch

MEMORIES = ("tree", "tokens")

# Log ratios of probabilities are rounded to one part in so many of a nat: above
# the last bits of float32, below the 1e-5 that trees are compared with.
_PRIOR_STEPS = 2**17


def make_step_model(
  network: Network,
  *,
  num_candidates: int,
  max_step_tokens: int,
  max_depth: int,
  stop_ids: tuple[int, ...],
  eos_id: int,
  pad_id: int,
  controls: sample.SamplingControls,
  memory: str = "tree",
  goes_on_where_cut: bool = False,
  enumerates: bool = False,
  opening: tuple[int, ...] = (),
  merge_duplicates: bool = True,
  num_rollouts: int = 0,
  guidance: Mapping[str, float] | None = None,
  guidance_functions: Mapping[str, guidance_lib.Guidance] | None = None,
) -> contracts.StepModel:
  """Builds the seam between a policy and a tree search.

  Args:
    network: the policy with its value head.
    num_candidates: A, candidates sampled at an expansion.
    max_step_tokens: S, tokens of a step at most.
    max_depth: steps after which a solution is cut off.
    stop_ids: tokens that end a step (none for whole solutions).
    eos_id: token that ends a solution.
    pad_id: fills a step after its end.
    controls: how candidates and rollouts are sampled.
    memory: "tree" or "tokens".
    goes_on_where_cut: True lets the next step go on where one runs out of room
      without a delimiter: segments of S tokens, single tokens where S is 1.
      False cuts the solution off there.
    enumerates: the candidates begin with the A likeliest tokens, one each, in
      place of sampled ones; each node then expands once.
    opening: tokens that begin each revision, behind the answer that it revises;
      () where an answer is final. A step is a whole solution then (no
      stop_ids), and `max_depth` is the first answer and its revisions.
    merge_duplicates: True keeps equal candidates once and corrects their prior
      for having been sampled; False keeps each (for votes).
    num_rollouts: M continuations sampled from every candidate to the end of
      the solution; the estimate of its outcome is the mean of their values. 0
      takes the guidance's score of the candidate itself.
    guidance: weights by name of what scores candidates; None for the value
      head. See search/guidance.py.
    guidance_functions: guidances of one's own by name.

  Returns:
    A `StepModel` whose `node_state` is a `NodeStore`.

  Raises:
    ValueError: an unknown memory, or a size below 1.
  """
  if memory not in MEMORIES:
    raise ValueError(f"memory={memory!r}: choose one of {MEMORIES}")
  if min(max_depth, max_step_tokens, num_candidates) < 1:
    raise ValueError(
      f"max_depth={max_depth}, max_step_tokens={max_step_tokens} and "
      f"num_candidates={num_candidates} must each be at least 1"
    )
  if num_rollouts and max_depth == 1:
    raise ValueError("num_rollouts needs max_depth of 2 or more: set it to 0")
  if enumerates and num_candidates > network.config.vocab_size:
    raise ValueError(
      f"num_candidates={num_candidates} is more than the "
      f"{network.config.vocab_size} tokens to enumerate: lower it"
    )
  if opening and (stop_ids or goes_on_where_cut or enumerates or num_rollouts):
    raise ValueError(
      "an opening is for whole solutions: leave stop_ids, goes_on_where_cut, "
      "enumerates and num_rollouts out"
    )
  if len(opening) >= max_step_tokens:
    raise ValueError(
      f"max_step_tokens={max_step_tokens} leaves no room behind the opening of "
      f"{len(opening)} tokens: raise it"
    )
  guidance = {"value": 1.0} if guidance is None else guidance
  guide, least_score = guidance_lib.weighted_mean(guidance, guidance_functions)
  reads_tokens = bool(guidance_functions) or any(
    guidance.get(name) for name in guidance_lib.OF_TOKENS
  )
  keeps_cache = memory == "tree"
  max_rollout_tokens = max_step_tokens * (max_depth - 1) if num_rollouts else 0
  decode = functools.partial(
    sample.decode_rows,
    network,
    eos_id=eos_id,
    pad_id=pad_id,
    controls=controls,
  )

  def root_fn(params: Any, problems: ProblemBatch, capacity: int):
    """Reads the prompts; see `contracts.StepModel`."""
    prompt, last_hidden = cache_lib.prefix_from_prompt(
      network, params, problems.tokens, problems.lengths
    )
    store = empty_store(
      problems,
      capacity + num_candidates,
      max_step_tokens,
      (num_rollouts, max_rollout_tokens),
      pad_id,
    )
    if reads_tokens:
      store = store.replace(confidence=store.log_prob, entropy=store.log_prob)
    if keeps_cache:
      store = with_memory(store, prompt, last_hidden)
    return network.value(params, last_hidden), problems.lengths, store

  def read_context(params, node, store):
    """Prefix and last hidden state of each node, and the tokens it cost."""
    path = path_to(store, node, max_depth - 1)
    steps, is_step = path_tokens(store, path, with_ends=not opening)
    if keeps_cache:
      return *gathered_context(store, node, path, is_step), 0
    return recomputed_context(network, params, store, steps, is_step)

  def first_tokens(params, last_hidden, is_root):
    """Tokens that candidates are made to begin with; arguments of `decode`."""
    shape = (is_root.shape[0], num_candidates)
    if enumerates:
      logits = network.policy_logits(params, last_hidden)
      likeliest = jax.lax.top_k(logits, num_candidates)[1]
      return dict(
        forced_tokens=likeliest[..., None],
        forced_lengths=jnp.ones(shape, jnp.int32),
        chosen=True,
      )
    if opening:
      given = jnp.array(opening, jnp.int32)[None, None]
      count = jnp.where(is_root, 0, len(opening))[:, None]
      return dict(
        forced_tokens=jnp.broadcast_to(given, (*shape, len(opening))),
        forced_lengths=jnp.broadcast_to(count, shape),
      )
    return {}

  def step_fn(params, keys, request, store):
    """Samples candidates; see `contracts.StepModel`."""
    node = request.node
    num_trees, num_leaves = node.shape
    row = jnp.arange(num_trees)[:, None]
    split = functools.partial(split_rows, shape=(num_trees, num_leaves))
    prefix, last_hidden, read_tokens = read_context(params, node, store)
    step_keys, rollout_keys = _named_keys(merge_rows(keys), num_candidates)
    end = store.end_positions[row, node]
    if opening:
      end = end - store.is_finished[row, node]
    index = jnp.arange(num_candidates)[None, None]
    rows = decode(
      params,
      step_keys,
      last_hidden,
      merge_rows(end),
      prefix,
      num_rows=num_candidates,
      max_new_tokens=max_step_tokens,
      stop_ids=stop_ids,
      is_active=merge_rows(index < request.num_rows[..., None]),
      with_certainty=reads_tokens,
      **first_tokens(params, last_hidden, merge_rows(node == ROOT)),
    )
    depth = store.depth[row, node] + 1
    ended = split(rows.ended)
    is_cut = split(~(rows.ended | rows.stopped)) & (not goes_on_where_cut)
    is_terminal = is_cut | (depth >= max_depth)[..., None]
    if not opening:
      is_terminal = is_terminal | ended
    is_valid, prior_logits = map(split, sampled_priors(rows, merge_duplicates))
    sibling_logits = None
    if merge_duplicates and request.siblings.shape[-1]:
      is_valid, sibling_logits = merge_into_siblings(
        store, request.siblings, split(rows.tokens), is_valid, prior_logits
      )
    new = _new_nodes(store, node, end, depth, rows, keeps_cache)
    signals = _signals(network, params, rows, new, store, len(opening))
    value = split(guide(signals))
    # A solution that was cut off has no answer, whatever its value says.
    outcome = jnp.where(ended | ~is_terminal, value, least_score)
    generated = split(rows.lengths).sum((1, 2))
    if num_rollouts:
      tokens, mean_value, rolled = _roll_out(
        functools.partial(decode, max_new_tokens=max_rollout_tokens),
        network,
        params,
        rollout_keys,
        prefix,
        rows,
        merge_rows(end),
        merge_rows(is_valid & ~is_terminal),
        num_rollouts,
      )
      new["rollout_tokens"] = tokens
      outcome = jnp.where(is_terminal, outcome, split(mean_value))
      generated = generated + split(rolled).sum((1, 2))
    is_active = request.num_rows > 0
    expansion = contracts.Expansion(
      prior_logits=prior_logits,
      is_valid=is_valid,
      is_terminal=is_terminal,
      is_solution=ended,
      value=value,
      outcome=outcome,
      generated_tokens=generated,
      forward_tokens=generated + jnp.where(is_active, read_tokens, 0).sum(1),
      sibling_logits=sibling_logits,
    )
    new = jax.tree.map(split, new)
    return expansion, write_nodes(store, request.first_child, new)

  most = max_step_tokens + num_rollouts * max_rollout_tokens
  return contracts.StepModel(num_candidates, root_fn, step_fn, most)


def sampled_priors(
  rows: sample.DecodedRows, merge_duplicates: bool
) -> tuple[jax.Array, jax.Array]:
  """Priors of candidates that were sampled, equal ones merged.

  A candidate drawn n times of A has the prior (n / A) p / q, p the policy's
  probability and q that of the distribution it was drawn from: Sampled MuZero,
  arXiv 2104.06303, Eq. 5. log p / q is rounded, so that where p is q but for
  the last bits, ties between priors are ties on every device.

  Returns:
    `(is_valid, prior_logits)`, both `[rows, A]`; of equal candidates the first
    is the valid one.
  """
  ratio = (rows.policy_log_probs - rows.behavior_log_probs).sum(-1)
  ratio = jnp.round(ratio * _PRIOR_STEPS) / _PRIOR_STEPS
  is_written = rows.lengths > 0
  if not merge_duplicates:
    return is_written, ratio
  is_equal = (rows.tokens[:, :, None] == rows.tokens[:, None, :]).all(-1)
  index = jnp.arange(rows.tokens.shape[1])
  is_later = index[:, None] > index[None, :]
  is_first = ~(is_equal & is_later[None]).any(-1)
  return is_written & is_first, ratio + jnp.log(is_equal.sum(-1))


def merge_into_siblings(
  store: NodeStore,
  siblings: jax.Array,
  tokens: jax.Array,
  is_valid: jax.Array,
  prior_logits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merges candidates that an earlier expansion of their node drew already.

  Args:
    store: the nodes.
    siblings: `[B, W, E]`, see `contracts.Request`.
    tokens: `[B, W, A, S]` of the new candidates.
    is_valid: `[B, W, A]`.
    prior_logits: `[B, W, A]`.

  Returns:
    `is_valid` without the merged ones, and `Expansion.sibling_logits`.
  """
  lowest = jnp.finfo(prior_logits.dtype).min
  row = jnp.arange(siblings.shape[0])[:, None, None]
  old = store.tokens[row, jnp.maximum(siblings, 0)]
  is_equal = (tokens[:, :, :, None] == old[:, :, None]).all(-1)
  is_equal &= is_valid[..., None] & (siblings != NO_NODE)[:, :, None]
  more = jnp.where(is_equal, prior_logits[..., None], lowest)
  return is_valid & ~is_equal.any(-1), jax.nn.logsumexp(more, axis=2)


def _named_keys(keys: jax.Array, num_candidates: int):
  """Keys of steps and of rollouts, `[rows, A]` each, from `[rows]`."""

  def one(key):
    step_key, rollout_key = jax.random.split(key)
    return (
      jax.random.split(step_key, num_candidates),
      jax.random.split(rollout_key, num_candidates),
    )

  return jax.vmap(one)(keys)


def _new_nodes(store, node, end, depth, rows, keeps_cache):
  """Fields of the store for the candidates of each node, `[B * W, A, ...]`."""
  tree = jnp.arange(node.shape[0])[:, None]

  def per_row(x):
    return jnp.broadcast_to(x.reshape(-1, 1), rows.lengths.shape)

  def so_far(name):
    return per_row(getattr(store, name)[tree, node])

  new = dict(
    tokens=rows.tokens,
    lengths=rows.lengths,
    parent=per_row(node),
    depth=per_row(depth),
    end_positions=per_row(end) + rows.lengths,
    is_finished=rows.ended,
    behavior_log_probs=rows.behavior_log_probs,
    policy_log_probs=rows.policy_log_probs,
    log_prob=so_far("log_prob") + rows.policy_log_probs.sum(-1),
  )
  if rows.confidence is not None:
    new["confidence"] = so_far("confidence") + rows.confidence
    new["entropy"] = so_far("entropy") + rows.entropy
  if keeps_cache:
    new |= dict(
      last_hidden=rows.last_hidden, keys=rows.keys, values=rows.values
    )
  return new


def _signals(
  network, params, rows, new, store, num_given
) -> guidance_lib.Signals:
  """What guidance may know of the candidates of each node, `[B * W, A]`.

  Of the tokens those count that the policy wrote, not a revision's first
  `num_given`.
  """
  num_leaves = rows.lengths.shape[0] // store.prompt_lengths.shape[0]
  prompt = jnp.repeat(store.prompt_lengths, num_leaves)[:, None]
  written = new["end_positions"] - prompt - num_given * (new["depth"] - 1)
  return guidance_lib.Signals(
    value=network.value(params, rows.last_hidden),
    log_prob=new["log_prob"],
    num_tokens=jnp.maximum(written, 1),
    confidence=new.get("confidence"),
    entropy=new.get("entropy"),
    hidden=rows.last_hidden,
  )


def _roll_out(
  decode, network, params, keys, prefix, rows, end, is_open, num_rollouts
):
  """Samples M continuations of every open candidate to the end of the text.

  Returns:
    tokens `[rows, A, M, T]`, mean value at the end `[rows, A]` (0 for one that
    did not end) and tokens spent `[rows, A]`.
  """
  num_candidates = rows.tokens.shape[1]
  repeat = functools.partial(jnp.repeat, repeats=num_candidates, axis=0)
  slots = jnp.arange(rows.tokens.shape[-1])
  own = cache_lib.Prefix(
    keys=tuple(map(merge_rows, rows.keys)),
    values=tuple(map(merge_rows, rows.values)),
    positions=repeat(end)[:, None] + slots[None],
    mask=slots[None] < merge_rows(rows.lengths)[:, None],
  )
  rolled = decode(
    params,
    jax.vmap(lambda k: jax.random.split(k, num_rollouts))(merge_rows(keys)),
    merge_rows(rows.last_hidden),
    merge_rows(end[:, None] + rows.lengths),
    cache_lib.join([jax.tree.map(repeat, prefix), own]),
    num_rows=num_rollouts,
    stop_ids=(),
    is_active=jnp.repeat(merge_rows(is_open)[:, None], num_rollouts, axis=1),
  )
  value = network.value(params, rolled.last_hidden)
  value = jnp.where(rolled.ended, value, 0.0).mean(1)
  back = functools.partial(split_rows, shape=(-1, num_candidates))
  return back(rolled.tokens), back(value), back(rolled.lengths.sum(1))
