"""Judgements of solutions: of the final answer, later of each step."""
