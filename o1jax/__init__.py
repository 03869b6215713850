"""Search and learning for reasoning language models, in JAX."""

__version__ = "0.1.0"
