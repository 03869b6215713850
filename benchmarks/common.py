"""What the benchmarks share: shapes, clock, taking turns, lines and tables.

Everything that is compared takes turns, A B C A B C, so that a busy machine
hits all alike; it runs in one process, but for the peers of `on_policy.py`. A
figure is the median over the rounds; a ratio is the median of the ratios round
by round, and says how many times longer the peer takes than ours.

Two clocks. `--clock=cpu` (the default) pins the process to one core, gives
every library one thread and counts CPU seconds: such ratios hold on a busy
machine. `--clock=wall` takes all cores and needs a quiet machine.
"""

import argparse
import collections
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from o1jax.mesh import keep_freed_memory
from o1jax.policy import Network, TransformerConfig, make_network

Runs = Mapping[Any, Callable[[], Any]]
Series = dict[Any, list[float]]  # seconds by name

# name: layers, width, heads, key/value heads, head width, ffn width, vocabulary
_SHAPES = {
  "tiny": (1, 16, 2, 2, 8, 32, 64),
  "S": (4, 128, 4, 4, 32, 352, 512),
  "S8": (8, 128, 4, 4, 32, 352, 512),
  "M": (6, 256, 8, 8, 32, 704, 4096),
  "L": (8, 512, 8, 4, 64, 1408, 32000),
  "job": (3, 96, 4, 4, 24, 256, 1301),  # of configs/countdown.py:no_hindsight
}
_TIED = ("job",)
SIZES = tuple(_SHAPES)


def network_config(size: str) -> TransformerConfig:
  """The shape of that name: RMSNorm, RoPE, SwiGLU; only "job" ties its head."""
  layers, width, heads, kv_heads, head_width, ffn_width, vocab = _SHAPES[size]
  return TransformerConfig(
    vocab_size=vocab,
    num_layers=layers,
    width=width,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_width=head_width,
    ffn_width=ffn_width,
    tied_embeddings=size in _TIED,
  )


def random_network(size: str) -> tuple[Network, Any]:
  """A network of that shape and random parameters."""
  network = make_network(network_config(size))
  params = network.init(jax.random.key(0))
  # The value head starts at zero; equal values would make a tree of ties.
  kernel = params["value_head"]["out"]["kernel"]
  params["value_head"]["out"]["kernel"] = jax.random.normal(
    jax.random.key(2), kernel.shape
  )
  return network, params


def random_prompts(size: str, num_prompts: int, length: int) -> jax.Array:
  """Tokens `[B, P]`; token 0 is the padding and does not occur."""
  vocab = network_config(size).vocab_size
  return jax.random.randint(
    jax.random.key(1), (num_prompts, length), 1, vocab, "int32"
  )


def make_parser(
  doc: str, *, repeats: int | None = 7
) -> argparse.ArgumentParser:
  """Options that all benchmarks have; `repeats` None for one without rounds."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
  if repeats is not None:
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds")
  return parser


def start(clock: str, num_devices: int = 1) -> None:
  """Sets threads, core, devices and memory; before the first array is made."""
  # As the commands do; peers in this process have it too.
  keep_freed_memory(num_devices)
  if num_devices > 1:
    jax.config.update("jax_num_cpu_devices", num_devices)
  if clock == "cpu":
    os.environ["OMP_NUM_THREADS"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def take_turns(runs: Runs, *, repeats: int, clock: str) -> Series:
  """Seconds of each of `runs`, which must block, round by round.

  The first call of each is not counted: it compiles.
  """
  now = time.process_time if clock == "cpu" else time.perf_counter
  for run in runs.values():
    run()
  series: Series = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      begin = now()
      run()
      series[name].append(now() - begin)
  return series


def ratio(
  series: Series, name: Any, base: Any, amounts: Mapping[Any, float]
) -> float:
  """How many times longer `name` takes than `base` for the same amount."""
  pairs = zip(series[name], series[base], strict=True)
  return statistics.median(a / b for a, b in pairs) * (
    amounts[base] / amounts[name]
  )


class Report:
  """Prints a JSON line per measurement and, at the end, their table."""

  def __init__(self, benchmark: str, clock: str):
    self._common = {"benchmark": benchmark, "clock": clock}
    self._rows: list[dict[str, Any]] = []
    print(json.dumps(machine()), flush=True)

  def add(self, **fields: Any) -> None:
    """One measurement."""
    self._rows.append(fields)
    line = self._common | fields | {"load": round(os.getloadavg()[0], 1)}
    print(json.dumps(line), flush=True)

  def add_series(
    self,
    series: Series,
    *,
    amounts: Mapping[str, float],
    unit: str,
    base: str = "ours",
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
  ) -> None:
    """One measurement per name: `amounts` of `unit` a call, as a rate."""
    for name, seconds in series.items():
      median = statistics.median(seconds)
      self.add(
        **fields,
        name=name,
        ms=round(1e3 * median, 3),
        ms_best=round(1e3 * min(seconds), 3),
        **{f"{unit}_per_s": round(amounts[name] / median)},
        over_ours=round(ratio(series, name, base, amounts), 2),
        **(extra[name] if extra else {}),
      )

  def skip(self, name: str, reason: Any) -> None:
    """Says that a peer was not measured."""
    print(json.dumps({"skipped": name, "reason": str(reason)[:200]}))

  def close(self) -> None:
    """Prints the table, one for each set of columns."""
    tables = collections.defaultdict(list)
    for row in self._rows:
      tables[tuple(row)].append(row)
    for columns, rows in tables.items():
      print("\n| " + " | ".join(columns) + " |")
      print("|" + "---|" * len(columns))
      for row in rows:
        print("| " + " | ".join(str(row[c]) for c in columns) + " |")


def machine() -> dict[str, Any]:
  """What the figures were taken on."""
  model = platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as lines:
      names = [x.split(":")[1].strip() for x in lines if "model name" in x]
    model = names[0] if names else model
  return {
    "machine": model,
    "cores": os.cpu_count(),
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "load": os.getloadavg(),
  }


def megabytes(num_bytes: float) -> float:
  return round(num_bytes / 2**20, 1)


def integers(text: str) -> Sequence[int]:
  """A comma-separated list, for argparse."""
  return [int(part) for part in text.split(",")]
