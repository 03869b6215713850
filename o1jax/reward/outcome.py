"""The outcome reward: checked answers, each text checked once.

A `Verifier` stands between the loop and a task's checker. It remembers its
verdicts, spreads the work over processes where the checker is slow, and turns
a checker that raises into a verdict. Verdicts come back in the order of the
texts whatever the order of the work.
"""

import concurrent.futures
import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence

from o1jax.types import Problem, Verdict

# Shares of the work per process: enough that one slow text delays little.
_CHUNKS_PER_WORKER = 4


class Verifier:
  """Checks solution texts, with memory and optional processes."""

  def __init__(
    self,
    check_fn: Callable[[Problem, str], Verdict],
    *,
    num_workers: int = 0,
    max_verdicts: int = 500_000,
  ):
    """Prepares the verifier; processes start with the first check.

    Args:
      check_fn: a checker whose verdict depends on the problem's id and the
        text alone. With workers it must be a function of a module, and its
        module is imported in each of them.
      num_workers: processes to check in; 0 checks in this one.
      max_verdicts: verdicts remembered; the oldest are forgotten first.
    """
    if num_workers < 0 or max_verdicts < 1:
      raise ValueError(
        f"num_workers={num_workers} must be 0 or more and "
        f"max_verdicts={max_verdicts} at least 1"
      )
    self._check_fn = check_fn
    self._num_workers = num_workers
    self._max_verdicts = max_verdicts
    self._verdicts: dict[tuple[str, str], Verdict] = {}
    self._pool = None

  def check(
    self, problems: Sequence[Problem], texts: Sequence[str]
  ) -> list[Verdict]:
    """Returns the verdict on each text for the problem beside it.

    A checker that raises gives an incorrect verdict whose reason begins with
    "checker error".

    Raises:
      ValueError: unequal numbers of problems and texts.
      RuntimeError: a worker process died.
    """
    if len(problems) != len(texts):
      raise ValueError(f"{len(problems)} problems but {len(texts)} texts")
    keys = [(p.id, text) for p, text in zip(problems, texts, strict=True)]
    # The verdicts of this call stay outside the memory until it ends, so that
    # a memory smaller than the call cannot forget what is still needed.
    found = {}
    missing = {}
    for key, problem in zip(keys, problems, strict=True):
      if key in self._verdicts:
        found[key] = self._verdicts[key]
      else:
        missing.setdefault(key, (problem, key[1]))
    fresh = self._check_all(list(missing.values()))
    found.update(zip(missing, fresh, strict=True))
    self._remember(zip(missing, fresh, strict=True))
    return [found[key] for key in keys]

  def close(self) -> None:
    """Ends the worker processes."""
    if self._pool is not None:
      self._pool.shutdown()
      self._pool = None

  def __enter__(self) -> "Verifier":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _remember(self, fresh):
    self._verdicts.update(fresh)
    num_extra = len(self._verdicts) - self._max_verdicts
    for key in list(itertools.islice(self._verdicts, max(num_extra, 0))):
      del self._verdicts[key]

  def _check_all(self, pairs):
    if not self._num_workers or not pairs:
      return _check_chunk(self._check_fn, pairs)
    if self._pool is None:
      # Spawned, not forked: a fork copies JAX's threads' locks as they stand.
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self._num_workers, multiprocessing.get_context("spawn")
      )
    size = math.ceil(len(pairs) / (_CHUNKS_PER_WORKER * self._num_workers))
    try:
      futures = [
        self._pool.submit(_check_chunk, self._check_fn, pairs[i : i + size])
        for i in range(0, len(pairs), size)
      ]
      return [verdict for future in futures for verdict in future.result()]
    except concurrent.futures.BrokenExecutor as error:
      self.close()
      raise RuntimeError(
        f"a checker process died while it checked {len(pairs)} texts; "
        "with num_workers=0 the cause shows in this process"
      ) from error


def _check_chunk(check_fn, pairs):
  return [_check_one(check_fn, problem, text) for problem, text in pairs]


def _check_one(check_fn, problem, text):
  try:
    return check_fn(problem, text)
  except Exception as error:  # Texts are untrusted, the loop must go on.
    reason = f"checker error: {type(error).__name__}: {error}"
    return Verdict(is_correct=False, reason=reason, answer=None)
