"""Problems as arrays."""

import numpy as np
import pytest

from o1jax.encoding import encode_problems, problem_seed
from o1jax.types import Problem
from policies import LENGTHS, ToyTask, tiny_policy

TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.sample_problems(np.random.default_rng(0), 3)


def test_a_prompt_that_does_not_fit_is_refused():
  long = Problem("toy/long", "toy", "1 " * LENGTHS.prompt_tokens + "\n", {})
  with pytest.raises(ValueError, match="prompt_tokens"):
    encode_problems(tiny_policy(), [PROBLEMS[0], long])


def test_problems_become_arrays():
  batch = encode_problems(tiny_policy(), PROBLEMS)
  tokenizer = tiny_policy().tokenizer
  for i, problem in enumerate(PROBLEMS):
    ids = tokenizer.encode(problem.prompt)
    assert batch.tokens[i].tolist() == ids + [tokenizer.pad_id] * (
      LENGTHS.prompt_tokens - len(ids)
    )
    assert batch.lengths[i] == len(ids)
  # Reference values of FNV-1a, 32 bits.
  for text, expected in (("", 0x811C9DC5), ("a", 0xE40C292C)):
    problem = Problem(text, "toy", "", {})
    assert problem_seed(problem) == expected
