"""Configs that cannot be are refused with the numbers and the remedy."""

import dataclasses

import pytest

from o1jax.policy.config import TransformerConfig, layer_values

GOOD = TransformerConfig(
  vocab_size=16,
  num_layers=2,
  width=8,
  num_heads=4,
  num_kv_heads=2,
  head_width=4,
  ffn_width=16,
)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ({"head_width": 5}, "5 rotary coordinates in head_width=5"),
    ({"rotary_width": 6}, "6 rotary coordinates in head_width=4"),
    ({"rope_base": (1e4,)}, "rope_base has 1 entries for num_layers=2"),
    ({"rope_scale": (1.0,) * 3}, "rope_scale has 3 entries"),
    ({"sliding_window": (None,)}, "sliding_window has 1 entries"),
    ({"sliding_window": (4, 0)}, "sliding_window=0 must be 1 or more"),
    ({"num_sinks": -1}, "num_sinks=-1 must be 0"),
    ({"num_sinks": 2}, "num_sinks=2 without a window: set sliding_window"),
    ({"num_layers": 0}, "num_layers=0 must be 1 or more"),
    ({"value_hidden_width": -1}, "value_hidden_width=-1"),
    ({"value_bins": 1}, r"value_bins=1 must be 0 \(one logit\), or 2 or more"),
    ({"value_bins": -2}, "value_bins=-2 must be 0"),
    ({"lora_rank": -1}, "lora_rank=-1 must be 0"),
    ({"lora_alpha": 0.0}, "lora_alpha=0.0 must be above 0"),
    ({"activation": "relu"}, "'relu' is not one of swiglu, geglu, gelu"),
    ({"qk_norm": "half"}, "'half' is not one of none, head, whole"),
    ({"rope_variant": "other"}, "'other' is not one of half, interleaved"),
    ({"dtype": "float16"}, "'float16' is not one of float32, bfloat16"),
    ({"norm_before": False}, "norm_before and norm_after are both False"),
  ],
)
def test_refusals(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(GOOD, **change)


def test_configs_are_keys():
  assert hash(GOOD) == hash(dataclasses.replace(GOOD))
  assert GOOD != dataclasses.replace(GOOD, qk_norm="head")
  assert GOOD.group == 2


def test_widest_window():
  assert GOOD.widest_window is None
  assert (
    dataclasses.replace(GOOD, sliding_window=(3, None)).widest_window is None
  )
  assert dataclasses.replace(GOOD, sliding_window=(3, 5)).widest_window == 5


def test_layer_values():
  assert layer_values(3.0, 2) == (3.0, 3.0)
  assert layer_values((None, 4), 2) == (None, 4)
