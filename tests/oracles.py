"""Slow and obvious oracles."""

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from o1jax.search.tree import UNEXPANDED, Tree
from o1jax.types import PolicyGradientBatch, PreferenceBatch
from worlds import World

Path = tuple[int, ...]


class DictionaryMCTS:
  """Textbook search of one world in dictionaries keyed by path.

  Expands a node at its first visit, as AlphaZero does, in float64; `visits`
  counts a node's own evaluation.
  """

  def __init__(
    self,
    world: World,
    root: int,
    *,
    rule: str,
    num_simulations: int,
    discount: float = 1.0,
    rollout_weight: float = 0.0,
    root_noise: np.ndarray | None = None,
    num_considered: int = 0,
    block: int | None = None,
    widening: tuple[float, float] = (1.0, 0.5),
  ):
    self.world = world
    self.rule = rule
    self.num_simulations = num_simulations
    self.discount = discount
    self.rollout_weight = rollout_weight
    self.root_noise = root_noise
    self.num_considered = num_considered
    # Candidates that one expansion shows; all of them without widening.
    self.block = block or world.child.shape[1]
    self.widening = widening
    self.num_shown: dict[Path, int] = {}
    self.state = {(): root}
    self.is_terminal = {(): False}
    self.reward = {(): 0.0}
    self.value = {(): float(world.root_value[root])}
    self.visits = {(): 1}
    self.total = {(): self.value[()]}
    for _ in range(num_simulations):
      self.simulate(())

  def simulate(self, path: Path) -> float:
    """One simulation from `path` down; returns what it is worth there."""
    action = None
    if not self.is_terminal[path]:
      self.widen(path)
      action = self.choose(path)
    if action is None:
      returned = self.value[path]
    else:
      child = (*path, action)
      if child not in self.visits:
        self.add(path, action)
        below = self.value[child]
        self.visits[child], self.total[child] = 1, below
      else:
        below = self.simulate(child)
      returned = self.reward[child] + self.discount * below
    self.visits[path] += 1
    self.total[path] += returned
    return returned

  def widen(self, path: Path) -> None:
    """Shows the first candidates, or the next ones where they are due."""
    shown = self.num_shown.get(path, 0)
    rate, exponent = self.widening
    is_due = shown < rate * self.visits[path] ** exponent
    if not shown or (is_due and shown < self.world.child.shape[1]):
      self.num_shown[path] = shown + self.block

  def add(self, path: Path, action: int) -> None:
    world, state, child = self.world, self.state[path], (*path, action)
    outcome = float(world.outcome[state, action])
    terminal = bool(world.is_terminal[state, action])
    weight = self.rollout_weight
    value = (1 - weight) * float(world.value[state, action]) + weight * outcome
    self.state[child] = int(world.child[state, action])
    self.is_terminal[child] = terminal
    self.reward[child] = outcome if terminal else 0.0
    self.value[child] = 0.0 if terminal else value

  def choose(self, path: Path) -> int | None:
    """The rule's choice among the valid candidates, None if there are none."""
    state = self.state[path]
    shown = self.world.is_valid[state][: self.num_shown[path]]
    valid = [a for a, ok in enumerate(shown) if ok]
    if not valid:
      return None
    logits = {a: float(self.world.prior_logits[state, a]) for a in valid}
    top = max(logits.values())
    norm = sum(math.exp(x - top) for x in logits.values())
    prior = {a: math.exp(x - top) / norm for a, x in logits.items()}
    count = {a: self.visits.get((*path, a), 0) for a in valid}
    q_value = {
      a: self.reward[(*path, a)]
      + self.discount * self.total[(*path, a)] / count[a]
      for a in valid
      if count[a]
    }
    mean = self.total[path] / self.visits[path]
    if self.rule == "puct":
      low = min([mean, *q_value.values()])
      spread = max(max([mean, *q_value.values()]) - low, 1e-8)
      n = self.visits[path]
      rate = 1.25 + math.log((n + 19652 + 1) / 19652)
      scores = {
        a: (q_value.get(a, low) - low) / spread
        + math.sqrt(n) * rate * prior[a] / (1 + count[a])
        for a in valid
      }
    elif self.rule == "uct":
      new = [a for a in valid if not count[a]]
      n = sum(count.values())
      scores = (
        {a: logits[a] for a in new}
        if new
        else {
          a: q_value[a] + math.sqrt(2) * math.sqrt(math.log(n) / count[a])
          for a in valid
        }
      )
    else:
      scores = self.gumbel_scores(path, prior, count, q_value)
    best = max(scores.values())
    return next(a for a in valid if a in scores and scores[a] == best)

  def gumbel_scores(self, path, prior, count, q_value):
    n = sum(count.values())
    mixed = self.value[path]
    if q_value:
      weight = sum(prior[a] for a in q_value)
      weighted = sum(prior[a] * q_value[a] for a in q_value) / weight
      mixed = (mixed + n * weighted) / (1 + n)
    # Invalid candidates stand in the range of Q with the mixed value too.
    completed = {a: q_value.get(a, mixed) for a in prior}
    has_gap = len(prior) < self.world.is_valid.shape[1]
    seen = [*completed.values(), *([mixed] if has_gap else [])]
    spread = max(max(seen) - min(seen), 1e-8)
    scale = (50 + max(count.values())) * 0.1
    logits = {
      a: math.log(prior[a]) + scale * (completed[a] - min(seen)) / spread
      for a in prior
    }
    if path:
      top = max(logits.values())
      norm = sum(math.exp(x - top) for x in logits.values())
      return {
        a: math.exp(logits[a] - top) / norm - count[a] / (1 + n) for a in prior
      }
    turn = halving(min(self.num_considered, len(prior)), self.num_simulations)
    return {
      a: logits[a] + float(self.root_noise[a])
      for a in prior
      if count[a] == turn[n]
    }


def halving(num_considered: int, num_simulations: int) -> list[int]:
  """Sequential Halving's visits, round by round and candidate by candidate."""
  visits = [0] * max(num_considered, 1)
  turns: list[int] = []
  remaining = len(visits)
  rounds = math.ceil(math.log2(remaining)) if remaining > 1 else 0
  while len(turns) < num_simulations:
    each = max(1, int(num_simulations / (rounds * remaining))) if rounds else 1
    for _ in range(each):
      for a in range(remaining):
        turns.append(visits[a])
        visits[a] += 1
    remaining = max(2, remaining // 2) if rounds else 1
  return turns[:num_simulations]


def visits_by_path(tree: Tree, row: int) -> dict[Path, int]:
  """Visits of every visited node of one tree, keyed by its path."""
  first = np.asarray(tree.first_child[row])[:, None]
  blocks = np.append(first, np.asarray(tree.more_blocks[row]), axis=1)
  visits = np.asarray(tree.num_visits[row])
  found: dict[Path, int] = {}
  stack: list[tuple[Path, int]] = [((), 0)]
  while stack:
    path, node = stack.pop()
    if not visits[node]:
      continue
    found[path] = int(visits[node])
    starts = [int(start) for start in blocks[node] if start != UNEXPANDED]
    actions = range(tree.num_candidates)
    for action, child in enumerate(s + a for s in starts for a in actions):
      stack.append(((*path, action), child))
  return found


def nodes_in_order(tree: Tree, row: int) -> list[Path]:
  """Paths of the valid nodes of one tree in the order of their index."""
  parents = np.asarray(tree.parent[row])
  paths: list[Path] = [()]
  num_children = [0] * len(parents)
  for parent in parents[1 : int(tree.next_free[row])]:
    paths.append((*paths[parent], num_children[parent]))
    num_children[parent] += 1
  is_valid = np.asarray(tree.is_valid[row])
  return [path for node, path in enumerate(paths) if is_valid[node]]


class Walker:
  """One world as paths: what every list-based search below stands on."""

  def __init__(self, world: World, root: int, *, block: int | None = None):
    self.world = world
    self.block = block or world.child.shape[1]
    self.state = {(): root}
    self.score = {(): float(world.root_value[root])}
    self.log_prior = {(): 0.0}
    self.finished: set[Path] = set()
    self.num_shown: dict[Path, int] = {}
    # Valid nodes in the order in which they were made.
    self.made: list[Path] = [()]
    self.expanded: list[Path] = []

  def expand(self, path: Path, num_rows: int | None = None) -> list[Path]:
    """Makes the next valid candidates of `path`; returns the open ones.

    Where there is no money for the whole block, `num_rows` are shown.
    """
    world, state = self.world, self.state[path]
    start = self.num_shown.get(path, 0)
    self.num_shown[path] = start + self.block
    self.expanded.append(path)
    shown = range(start, start + (self.block if num_rows is None else num_rows))
    valid = [a for a in shown if world.is_valid[state, a]]
    norm = sum(math.exp(world.prior_logits[state, a]) for a in valid)
    for a in valid:
      child, terminal = (*path, a), bool(world.is_terminal[state, a])
      self.state[child] = int(world.child[state, a])
      table = world.outcome if terminal else world.value
      self.score[child] = float(table[state, a])
      prior = float(world.prior_logits[state, a]) - math.log(norm)
      self.log_prior[child] = self.log_prior[path] + prior
      if terminal:
        self.finished.add(child)
      self.made.append(child)
    return [(*path, a) for a in valid if (*path, a) not in self.finished]


def brute_force_beam(
  world: World,
  root: int,
  *,
  width: int,
  max_depth: int,
  num_subtrees: int = 1,
  num_root_blocks: int = 1,
  block: int | None = None,
  num_payable: int = 10**9,
) -> Walker:
  """Beam search layer by layer in lists; DVTS where there are subtrees.

  The budget pays for `num_payable` candidates. One that is not valid turns out
  to cost nothing, but only when the round that drew it is over.
  """
  walker = Walker(world, root, block=block)

  def expand_some(waiting: list[Path]) -> list[Path]:
    """One round; returns those that it could not pay for."""
    num_rows = num_payable - (len(walker.made) - 1)
    for place, path in enumerate(waiting):
      if num_rows == 0:
        return waiting[place:]
      walker.expand(path, min(walker.block, num_rows))
      num_rows -= min(walker.block, num_rows)
    return []

  expand_some([()] * num_root_blocks)
  beams: list[list[Path]] = [[] for _ in range(num_subtrees)]
  for number, first in enumerate(walker.made[1:]):
    if first not in walker.finished:
      beams[number % num_subtrees].append(first)
  for _ in range(max_depth - 1):
    order = {path: i for i, path in enumerate(walker.made)}
    kept = [
      sorted(beam, key=lambda path: (-walker.score[path], order[path]))
      for beam in beams
    ]
    kept = [beam[: width // num_subtrees] for beam in kept]
    turns = itertools.zip_longest(*kept)
    waiting = [path for turn in turns for path in turn if path is not None]
    num_made = len(walker.made)
    while waiting and len(walker.made) <= num_payable:
      waiting = expand_some(waiting)
    new = [p for p in walker.made[num_made:] if p not in walker.finished]
    beams = [[p for p in new if p[:-1] in beam] for beam in kept]
  return walker


def best_first_in_lists(
  world: World,
  root: int,
  *,
  num_expansions: int,
  priority,
  num_leaves: int = 1,
  stop_at_solution: bool = False,
) -> Walker:
  """Keeps a list of open nodes and sorts it anew in every round.

  `priority` is of `(walker, path)`.
  """
  walker = Walker(world, root)
  waiting: list[Path] = [()]
  while waiting and len(walker.expanded) < num_expansions:
    order = {path: i for i, path in enumerate(walker.made)}
    waiting.sort(key=lambda path: (-priority(walker, path), order[path]))
    ends = [priority(walker, path) for path in walker.finished]
    if stop_at_solution and ends:
      if max(ends) >= priority(walker, waiting[0]):
        break
    left = num_expansions - len(walker.expanded)
    now = waiting[: min(num_leaves, left)]
    waiting = waiting[len(now) :]
    for path in now:
      waiting += walker.expand(path)
  return walker


def recursive_depth_first(
  world: World, root: int, *, num_expansions: int, min_score: float
) -> Walker:
  """The textbook recursion: candidates by falling score, then back."""
  walker = Walker(world, root)

  def visit(path: Path) -> None:
    if len(walker.expanded) == num_expansions:
      return
    children = walker.expand(path)
    for child in sorted(children, key=lambda child: -walker.score[child]):
      if walker.score[child] >= min_score:
        visit(child)

  visit(())
  return walker


def expected_best_of_n(world: World, root: int, num_solutions: int) -> float:
  """The mean outcome of the best of n solutions drawn by the prior, exactly."""

  def leaves(state: int, prob: float) -> list[tuple[float, float]]:
    weights = np.exp(world.prior_logits[state]) * world.is_valid[state]
    found = []
    for a, weight in enumerate(weights / np.sum(weights)):
      if world.is_terminal[state, a]:
        found.append((float(world.outcome[state, a]), prob * weight))
      else:
        found += leaves(int(world.child[state, a]), prob * weight)
    return found

  found = leaves(root, 1.0)
  expected, below = 0.0, 0.0
  for outcome in sorted({outcome for outcome, _ in found}):
    up_to = sum(prob for other, prob in found if other <= outcome)
    chance = up_to**num_solutions - below**num_solutions
    expected, below = expected + outcome * chance, up_to
  return expected


def best_first_steps(world: World, root: int) -> list[int]:
  """First steps from which the best outcome of a finite world is reached."""

  def best(state: int) -> list[float]:
    scores = []
    for a in range(world.child.shape[1]):
      if not world.is_valid[state, a]:
        scores.append(-math.inf)
      elif world.is_terminal[state, a]:
        scores.append(float(world.outcome[state, a]))
      else:
        scores.append(max(best(int(world.child[state, a]))))
    return scores

  scores = best(root)
  return [a for a, score in enumerate(scores) if score == max(scores)]


class Draws:
  """What `chance_model` with one candidate draws, by path, one at a time.

  The key of an expansion is that of the problem's tree folded with a hash of
  the path to the node and of how often it was expanded before.
  """

  def __init__(self, world: World, key, seed: int, are_answers: bool = False):
    self.world = world
    self.are_answers = are_answers
    self.tree_key = jax.random.split(jax.random.fold_in(key, seed))[1]
    self.state = {(): 0}
    self.path_id = {(): 0}
    self.is_valid = {(): True}
    self.is_terminal = {(): False}
    self.score = {(): float(world.root_value[0])}

  def expand(self, path: Path, block: int) -> Path:
    """Draws the candidate that `path` gets in its block of that number."""
    node, world, state = self.path_id[path], self.world, self.state[path]
    own = node if block == 0 else mix(node, -block)
    key = jax.random.fold_in(self.tree_key, np.uint32(own))
    action = int(jax.random.categorical(key, world.prior_logits[state]))
    child = (*path, block)
    self.path_id[child] = mix(node, block)
    self.state[child] = int(world.child[state, action])
    self.is_valid[child] = bool(world.is_valid[state, action])
    self.is_terminal[child] = bool(world.is_terminal[state, action])
    is_solution = self.are_answers or self.is_terminal[child]
    table = world.outcome if is_solution else world.value
    self.score[child] = float(table[state, action])
    return child


def mix(path_id: int, action: int) -> int:
  """Hash of a child's path: MurmurHash3's finalizer, in whole numbers."""
  mixed = (path_id * 0x9E3779B1 + action + 1) % 2**32
  mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
  mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
  return mixed ^ mixed >> 16


def grow_chains(
  draws: Draws,
  *,
  num_chains: int,
  num_starts: int,
  num_nodes: int,
  stops: Callable[[list[Path]], set[Path]],
) -> list[Path]:
  """The last nodes of all chains that ended, within so many drawn nodes.

  `stops` gets the live chains and says which of them end.
  """
  live: list[Path] = []
  ended: list[Path] = []
  num_started = spent = 0
  while True:
    live.sort(key=lambda path: -len(path))
    num_new = min(num_chains - len(live), num_starts - num_started)
    leaves = [*live, *[()] * num_new][: num_nodes - spent]
    if not leaves:
      return ended
    live = live[len(leaves) :]
    for leaf in leaves:
      child = draws.expand(leaf, 0 if leaf else num_started)
      num_started += not leaf
      spent += 1
      if not draws.is_valid[child]:
        ended += [leaf] if leaf else []
      elif draws.is_terminal[child]:
        ended.append(child)
      else:
        live.append(child)
    live.sort(key=lambda path: -len(path))
    stopped = stops(live)
    ended += [path for path in live if path in stopped]
    live = [path for path in live if path not in stopped]


def lowest_share(draws: Draws, rate: float) -> Callable:
  """The rule of speculative rejection for `grow_chains`."""

  def stops(live: list[Path]) -> set[Path]:
    kept = sorted(live, key=lambda path: -draws.score[path])
    return set(kept[len(live) - int(len(live) * rate) :])

  return stops


def stopped_answers(
  draws: Draws, num_revisions: int, threshold: float, patience: int
) -> Callable:
  """The rules of revisions for `grow_chains`."""

  def is_over(path: Path) -> bool:
    scores = [draws.score[path[:n]] for n in range(1, len(path) + 1)]
    is_stuck = len(scores) > patience and (
      max(scores[-patience:]) <= max(scores[:-patience])
    )
    is_good = scores[-1] >= threshold
    return len(path) > num_revisions or is_good or is_stuck

  return lambda live: {path for path in live if is_over(path)}


def visits_of(ended: list[Path]) -> dict[Path, int]:
  """Visits of all nodes after one simulation to each of these."""
  visits: dict[Path, int] = {(): 1}
  for path in ended:
    for depth in range(len(path) + 1):
      visits[path[:depth]] = visits.get(path[:depth], 0) + 1
  return visits


class DictionaryMCTSr:
  """MCT Self-Refine's published recurrences, on answers drawn one by one."""

  def __init__(
    self,
    draws: Draws,
    *,
    num_simulations: int,
    max_children: int,
    exploration: float,
    max_blocks: float = math.inf,
  ):
    self.draws = draws
    self.max_blocks = max_blocks
    self.exploration = exploration
    self.max_children = max_children
    self.children: dict[Path, list[Path]] = {(): []}
    self.num_drawn = {(): 0}
    self.visits = {(): 1}
    self.quality = {(): draws.score[()]}
    for _ in range(num_simulations):
      nodes = [path for path in self.quality if self.is_open(path)]
      if not nodes:
        break
      self.refine(max(nodes, key=self.uct))

  def is_open(self, path: Path) -> bool:
    """Not fully expanded, and not an answer that nothing can follow."""
    num_drawn = self.num_drawn[path]
    if self.draws.is_terminal[path] or num_drawn >= self.max_blocks:
      return False
    below = [self.quality[child] for child in self.children[path]]
    has_better = not below or max(below) > self.quality[path]
    return num_drawn < self.max_children or not has_better

  def uct(self, path: Path) -> float:
    father = self.visits[path[:-1]]
    explore = math.sqrt((math.log(father) + 1) / (self.visits[path] + 1e-5))
    return self.quality[path] + self.exploration * explore

  def refine(self, path: Path) -> None:
    """One simulation: a visit, a revision, and its score on the way up."""
    child = self.draws.expand(path, self.num_drawn[path])
    self.num_drawn[path] += 1
    self.visits[path] += 1
    if not self.draws.is_valid[child]:
      return
    self.children[path].append(child)
    self.children[child], self.num_drawn[child] = [], 0
    self.visits[child] = 1
    rewards = [self.draws.score[child]]
    self.quality[child] = (min(rewards) + sum(rewards) / len(rewards)) / 2
    for depth in range(len(path), -1, -1):
      above = path[:depth]
      best = max(self.quality[below] for below in self.children[above])
      self.quality[above] = (self.draws.score[above] + best) / 2


def commit_and_search(
  oracle: DictionaryMCTS, num_simulations: int, max_commits: int
) -> list[Path]:
  """Goes on with a dictionary search, root after root; returns the roots.

  The next root is the most visited child, of equal ones that of the higher
  return, then the first.
  """
  roots: list[Path] = [()]
  while True:
    root = roots[-1]
    for _ in range(num_simulations):
      returned = oracle.simulate(root)
      for depth in range(len(root), 0, -1):
        returned = oracle.reward[root[:depth]] + oracle.discount * returned
        oracle.visits[root[: depth - 1]] += 1
        oracle.total[root[: depth - 1]] += returned
    children = [
      path
      for path in oracle.visits
      if len(path) == len(root) + 1 and path[: len(root)] == root
    ]
    if len(root) == max_commits or not children:
      return roots
    roots.append(
      max(
        children,
        key=lambda path: (
          oracle.visits[path],
          oracle.reward[path] + oracle.total[path] / oracle.visits[path],
          [-action for action in path],
        ),
      )
    )
    if oracle.is_terminal[roots[-1]]:
      return roots


class LossInLoops:
  """The loss of an update and what it reports, token after token.

  Importance weights are constants to the slope of a loss: they are taken with
  the parameters that `weigh` was given last.
  """

  def __init__(self, objective, forward_fn, groups):
    self.objective = objective
    self.forward_fn = forward_fn
    self.groups = groups
    self.ratios: dict[tuple[int, int, int], float] = {}

  def weigh(self, params) -> None:
    """Takes the ratios to what drew the tokens, at the level of the options."""
    for g, group in enumerate(self.groups):
      if not isinstance(group, PolicyGradientBatch):
        continue
      for row, tokens in enumerate(group.tokens):
        log_probs = self.following(params, tokens)
        places = np.flatnonzero(group.policy_weights[row]).tolist()
        gaps = {
          t: log_probs[t] - float(group.behavior_log_probs[row, t])
          for t in places
        }
        whole = sum(gaps.values())
        is_whole = self.objective.policy_gradient.importance == "sequence"
        for t in places:
          self.ratios[g, row, t] = math.exp(whole if is_whole else gaps[t])

  def following(self, params, tokens) -> list[float]:
    log_probs, _ = self.forward_fn(params, tokens)
    return [float(log_probs[t, n]) for t, n in enumerate(np.roll(tokens, -1))]

  def __call__(self, params) -> dict[str, float]:
    """Means by name: the loss, its terms, and the numbers that are means."""
    self.sums: dict[str, float] = {}
    self.weights: dict[str, float] = {}
    for g, group in enumerate(self.groups):
      for row in range(len(group.tokens)):
        if isinstance(group, PreferenceBatch):
          self.pair(params, group, row)
        elif isinstance(group, PolicyGradientBatch):
          self.drawn(params, group, g, row)
        else:
          self.cloned(params, group, row)
    means = {
      name: total / self.weights[name] if self.weights[name] else 0.0
      for name, total in self.sums.items()
    }
    coefficients = self.objective.coefficients()
    means["loss"] = sum(
      coefficient * means[f"{name}_loss"]
      for name, coefficient in coefficients.items()
      if f"{name}_loss" in means
    )
    return means

  def add(self, name: str, weight: float, value: float) -> None:
    weight = float(weight)
    self.sums[name] = self.sums.get(name, 0.0)
    self.weights[name] = self.weights.get(name, 0.0) + weight
    if weight:
      self.sums[name] += weight * float(value)

  def cloned(self, params, group, row: int) -> None:
    log_probs = self.following(params, group.tokens[row])
    _, logits = self.forward_fn(params, group.tokens[row])
    for t in range(group.tokens.shape[1]):
      self.add("policy_loss", group.policy_weights[row, t], -log_probs[t])
      self.add(
        "value_loss",
        group.value_weights[row, t],
        cross_entropy(logits[t], float(group.value_targets[row, t])),
      )

  def drawn(self, params, group, g: int, row: int) -> None:
    options = self.objective.policy_gradient
    tokens = group.tokens[row]
    whole, logits = self.forward_fn(params, tokens)
    log_probs = self.following(params, tokens)
    for t in range(len(tokens)):
      self.value_of_draw(options, group, row, t, logits[t])
      weight = group.policy_weights[row, t]
      if not weight:
        self.add("policy_gradient_loss", 0, 0)
        continue
      advantage = float(group.advantages[row, t])
      ratio = math.exp(log_probs[t] - float(group.behavior_log_probs[row, t]))
      loss, is_clipped = self.surrogate(
        options, log_probs[t], ratio, self.ratios[g, row, t], advantage
      )
      self.add("policy_gradient_loss", weight, loss)
      if options.loss == "ppo":
        self.add("clip_share", weight, is_clipped)
      elif options.max_weight:
        self.add("truncated_share", weight, is_clipped)
      gap = log_probs[t] - float(group.reference_log_probs[row, t])
      self.add("kl_to_reference", weight, math.exp(-gap) - 1 + gap)
      self.add("kl_to_behavior", weight, 1 / ratio - 1 + math.log(ratio))
      if options.kl_coefficient:
        is_square = options.kl_estimator == "k2"
        penalty = gap**2 / 2 if is_square else math.exp(-gap) - 1 + gap
        self.add("kl_loss", weight, penalty)
      entropy = -sum(math.exp(x) * x for x in whole[t].tolist())
      if options.entropy_coefficient:
        self.add("entropy_loss", weight, entropy)
        self.add("entropy", weight, entropy)
      else:
        self.add("entropy", weight, -log_probs[t])

  @staticmethod
  def surrogate(options, log_prob, ratio, importance, advantage):
    """`(loss of a token, whether its ratio was out of bounds)`."""
    if options.loss == "reinforce":
      is_large = bool(options.max_weight) and importance > options.max_weight
      weight = options.max_weight if is_large else importance
      if options.importance == "none":
        weight = 1.0
      return -advantage * weight * log_prob, is_large
    low, high = 1 - options.clip_low, 1 + options.clip_high
    gained = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    is_clipped = ratio > high if advantage > 0 else ratio < low
    if options.dual_clip and advantage < 0:
      is_clipped = is_clipped or ratio > options.dual_clip
      gained = max(gained, options.dual_clip * advantage)
    return -gained, is_clipped and advantage != 0

  def value_of_draw(self, options, group, row: int, t: int, logit) -> None:
    weight = group.value_weights[row, t]
    target = float(group.value_targets[row, t])
    if not weight:
      loss = 0.0
    elif not options.max_value_change:
      loss = cross_entropy(logit, target)
    else:
      value = value_by_hand(logit)
      old = float(group.behavior_values[row, t])
      change = options.max_value_change
      near = min(max(value, old - change), old + change)
      loss = max((value - target) ** 2, (near - target) ** 2) / 2
      if np.ndim(logit):
        is_beyond = abs(value - target) < abs(near - target)
        loss = 0.0 if is_beyond else cross_entropy(logit, target)
    self.add("value_loss", weight, loss)

  def pair(self, params, group, row: int) -> None:
    options = self.objective.preference
    weight = group.pair_weights[row]
    rewards, log_ratios = [], []
    for side in range(2):
      log_probs = self.following(params, group.tokens[row, side])
      places = np.flatnonzero(group.token_weights[row, side]).tolist()
      total = sum(
        log_probs[t] - float(group.reference_log_probs[row, side, t])
        for t in places
      )
      if options.is_length_normalized:
        total /= max(len(places), 1)
      log_ratios.append(total)
      rewards.append(options.beta * total)
    margin = rewards[0] - rewards[1]
    if options.variant == "ipo":
      loss = (log_ratios[0] - log_ratios[1] - 1 / (2 * options.beta)) ** 2
    else:
      right = math.log(1 + math.exp(-margin))
      wrong = math.log(1 + math.exp(margin))
      loss = (1 - options.label_noise) * right + options.label_noise * wrong
    self.add("preference_loss", weight, loss)
    accuracy = 0.5 if margin == 0 else float(margin > 0)
    self.add("preference_accuracy", weight, accuracy)
    self.add("preference_margin", weight, margin)
    self.add("preference_preferred_reward", weight, rewards[0])
    self.add("preference_dispreferred_reward", weight, rewards[1])

  def ratio_numbers(self) -> dict[str, float]:
    """The largest and smallest ratio, and Kong's share of the tokens."""
    total = square = weights = 0.0
    for (g, row, t), ratio in self.ratios.items():
      weight = float(self.groups[g].policy_weights[row, t])
      weights += weight
      total += weight * ratio
      square += weight * ratio**2
    return {
      "max_ratio": max([1.0, *self.ratios.values()]),
      "min_ratio": min([1.0, *self.ratios.values()]),
      "effective_share": total**2 / square / weights if square else 0.0,
    }


def value_by_hand(logits) -> float:
  """The value of one logit, or the mean of bins `[K]`."""
  if not np.ndim(logits):
    return 1 / (1 + math.exp(-float(logits)))
  weights = [math.exp(x) for x in logits]
  total = sum(w * k for k, w in enumerate(weights))
  return total / sum(weights) / (len(weights) - 1)


def cross_entropy(logits, target: float) -> float:
  """Of a value's logit, or logits of bins, with an outcome in [0, 1]."""
  if not np.ndim(logits):
    value = value_by_hand(logits)
    return -target * math.log(value) - (1 - target) * math.log(1 - value)
  log_total = math.log(sum(math.exp(x) for x in logits))
  place = min(max(target, 0.0), 1.0) * (len(logits) - 1)
  lower = min(int(place), len(logits) - 2)
  share = place - lower
  return log_total - (1 - share) * logits[lower] - share * logits[lower + 1]
