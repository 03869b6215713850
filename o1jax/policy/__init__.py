"""Policy initialization's tools: tokenizer, transformer, cache, sampling.

What other floors use is named here; Flax Linen stays inside transformer, heads
and network.
"""

from o1jax.policy.cache import (
  Cache,
  Prefix,
  grow,
  join,
  make_cache,
  prefix_from_prompt,
)
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import Network, make_network, next_token_log_probs
from o1jax.policy.sample import (
  DecodedRows,
  SamplingControls,
  decode_rows,
  make_controls,
  sample_tokens,
)
from o1jax.policy.tokenizer import Tokenizer, train_tokenizer

__all__ = [
  "Cache",
  "DecodedRows",
  "Network",
  "Prefix",
  "SamplingControls",
  "Tokenizer",
  "TransformerConfig",
  "decode_rows",
  "grow",
  "join",
  "make_cache",
  "make_controls",
  "make_network",
  "next_token_log_probs",
  "prefix_from_prompt",
  "sample_tokens",
  "train_tokenizer",
]
