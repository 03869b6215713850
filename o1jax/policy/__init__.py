"""Policy initialization's tools: tokenizer, transformer, cache, sampling.

What other floors use is named here; Flax Linen stays inside transformer, heads
and network.
"""

from o1jax.policy.cache import (
  Cache,
  Prefix,
  grow,
  join,
  keep_window,
  make_cache,
  prefix_from_prompt,
  quantize_prefix,
)
from o1jax.policy.config import TransformerConfig
from o1jax.policy.drafts import Draft, ModelDraft, NgramDraft
from o1jax.policy.network import Network, make_network, next_token_log_probs
from o1jax.policy.quantize import Quantized, dequantize, quantize
from o1jax.policy.sample import (
  DecodedRows,
  SamplingControls,
  decode_rows,
  make_controls,
  sample_tokens,
)
from o1jax.policy.speculative import (
  SpeculatedRows,
  check_draft,
  speculate_rows,
)
from o1jax.policy.tokenizer import Tokenizer, train_tokenizer

__all__ = [
  "Cache",
  "DecodedRows",
  "Draft",
  "ModelDraft",
  "Network",
  "NgramDraft",
  "Prefix",
  "Quantized",
  "SamplingControls",
  "SpeculatedRows",
  "Tokenizer",
  "TransformerConfig",
  "check_draft",
  "decode_rows",
  "dequantize",
  "grow",
  "join",
  "keep_window",
  "make_cache",
  "make_controls",
  "make_network",
  "next_token_log_probs",
  "prefix_from_prompt",
  "quantize",
  "quantize_prefix",
  "sample_tokens",
  "speculate_rows",
  "train_tokenizer",
]
