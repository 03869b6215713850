"""The switches of the decoder, in one frozen record.

One decoder serves the tiny defaults and the published families: Llama and
SmolLM (the defaults here), Qwen2 (qkv_bias), Qwen3 (qk_norm="head"), Gemma 2
(norm_after, soft caps, alternating windows, query_scale), Gemma 3 (two rotary
bases, qk_norm="head") and OLMo 2 (norm_after without norm_before,
qk_norm="whole"). A field that may differ from layer to layer takes one value
or a tuple of num_layers values.
"""

import dataclasses
from typing import Any

ACTIVATIONS = ("swiglu", "geglu", "gelu")
ROPE_VARIANTS = ("half", "interleaved")
QK_NORMS = ("none", "head", "whole")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder with a value head; hashable, so that it can be static in jit.

  Attributes:
    vocab_size: V, rows of the embedding.
    num_layers: L.
    width: D, of the residual stream.
    num_heads: H query heads.
    num_kv_heads: J key/value heads; H / J query heads share one.
    head_width: E.
    ffn_width: F, of the feed-forward layer.
    activation: "swiglu", "geglu" (tanh approximation) or "gelu" (no gate).
    norm_before: RMSNorm on the input of each block.
    norm_after: RMSNorm on the output of each block, before it is added.
    norm_eps: added to the mean square.
    norm_plus_one: norms multiply by 1 + scale (Gemma); else by scale.
    qk_norm: RMSNorm on queries and keys: "none", "head" (over E) or "whole"
      (over all heads together).
    qkv_bias: bias on the query, key and value projection.
    out_bias: bias on the attention's output projection.
    mlp_bias: biases in the feed-forward layer.
    rope_base: rotary base, one or one per layer.
    rope_variant: "half" pairs coordinate i with i + E/2, "interleaved" 2i with
      2i + 1.
    rope_scale: positions are divided by it, one or one per layer.
    rope_llama3: None, or (factor, low, high, original length) of Llama 3.1's
      frequency scaling.
    rotary_width: leading coordinates of a head that rotate; None for all.
    sliding_window: positions a query reads back, itself included; None for
      all; one or one per layer.
    num_sinks: first positions that are read from beyond a window as well.
    query_scale: multiplies the scores; None for E ** -0.5.
    attention_soft_cap: scores become cap * tanh(score / cap); None for none.
    final_soft_cap: the same for the policy's logits.
    embedding_scale: multiplies embeddings on the way in.
    tied_embeddings: the embedding is the policy head as well.
    value_hidden_width: hidden units of the value head; 0 for a linear one.
    value_bins: K atoms over which the value is a distribution (`value_bins`), 2
      or more; 0 for one logit.
    number_features: start the embeddings of number pieces from features of
      their value.
    lora_rank: inner width of the adapters beside the layers' products; 0 for
      none (Hu et al., arXiv 2106.09685).
    lora_alpha: what an adapter adds counts lora_alpha / lora_rank.
    remat: keep only the inputs of each block for the gradient and compute the
      rest again (Chen et al., arXiv 1604.06174): less memory, more time.
    dtype: dtype of activations and caches; parameters, norms, softmax and
      logits are float32.

  Raises:
    ValueError: fields that do not fit together, with the numbers.
  """

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  ffn_width: int
  activation: str = "swiglu"
  norm_before: bool = True
  norm_after: bool = False
  norm_eps: float = 1e-6
  norm_plus_one: bool = False
  qk_norm: str = "none"
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  rope_base: float | tuple[float, ...] = 10000.0
  rope_variant: str = "half"
  rope_scale: float | tuple[float, ...] = 1.0
  rope_llama3: tuple[float, float, float, float] | None = None
  rotary_width: int | None = None
  sliding_window: int | None | tuple[int | None, ...] = None
  num_sinks: int = 0
  query_scale: float | None = None
  attention_soft_cap: float | None = None
  final_soft_cap: float | None = None
  embedding_scale: float = 1.0
  tied_embeddings: bool = False
  value_hidden_width: int = 0
  value_bins: int = 0
  number_features: bool = False
  lora_rank: int = 0
  lora_alpha: float = 16.0
  remat: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    self._check_sizes()
    self._check_names()
    for field in ("rope_base", "rope_scale", "sliding_window"):
      given = getattr(self, field)
      if isinstance(given, tuple) and len(given) != self.num_layers:
        raise ValueError(
          f"{field} has {len(given)} entries for num_layers="
          f"{self.num_layers}: give one value or one per layer"
        )
    windows = layer_values(self.sliding_window, self.num_layers)
    for window in windows:
      if window is not None and window < 1:
        raise ValueError(
          f"sliding_window={window} must be 1 or more, or None for no window"
        )
    if self.num_sinks < 0:
      raise ValueError(f"num_sinks={self.num_sinks} must be 0 (none) or more")
    if self.num_sinks and not any(windows):
      raise ValueError(
        f"num_sinks={self.num_sinks} without a window: set sliding_window, or "
        "num_sinks to 0"
      )

  def _check_sizes(self):
    for field in (
      "vocab_size",
      "num_layers",
      "width",
      "num_heads",
      "num_kv_heads",
      "head_width",
      "ffn_width",
    ):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)} must be 1 or more")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
        f"{self.num_kv_heads}: change one of them"
      )
    if self.value_hidden_width < 0:
      raise ValueError(
        f"value_hidden_width={self.value_hidden_width} must be 0 (linear) or "
        "more"
      )
    if self.value_bins < 0 or self.value_bins == 1:
      raise ValueError(
        f"value_bins={self.value_bins} must be 0 (one logit), or 2 or more"
      )
    if self.lora_rank < 0:
      raise ValueError(f"lora_rank={self.lora_rank} must be 0 (none) or more")
    if self.lora_alpha <= 0:
      raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0")
    rotary = self.head_width if self.rotary_width is None else self.rotary_width
    if rotary % 2 or not 0 <= rotary <= self.head_width:
      raise ValueError(
        f"{rotary} rotary coordinates in head_width={self.head_width}: rotary "
        "embeddings need an even number within the head; set rotary_width or "
        "head_width"
      )

  def _check_names(self):
    for field, known in (
      ("activation", ACTIVATIONS),
      ("rope_variant", ROPE_VARIANTS),
      ("qk_norm", QK_NORMS),
      ("dtype", DTYPES),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field}={getattr(self, field)!r} is not one of {', '.join(known)}"
        )
    if not (self.norm_before or self.norm_after):
      raise ValueError(
        "norm_before and norm_after are both False: set one of them"
      )

  @property
  def group(self) -> int:
    """Query heads that share one key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def widest_window(self) -> int | None:
    """The largest window of any layer; None where one reads everything."""
    windows = layer_values(self.sliding_window, self.num_layers)
    return None if None in windows else max(windows)


def layer_values(given: Any, num_layers: int) -> tuple[Any, ...]:
  """One value or one per layer, as one per layer."""
  return given if isinstance(given, tuple) else (given,) * num_layers
