"""Losses over arrays, the optimizer, and the one update program."""
