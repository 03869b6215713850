"""Switches that make the tests strict; everything here runs before jax starts.

Eight CPU devices are forced so that every sharding can be tried, implicit rank
promotion and reuse of a random key are errors (warnings too: pyproject.toml),
and under CI=true a skipped test is a failed one.
"""

import os
import pathlib
import sys

NUM_DEVICES = 8
ROOT = pathlib.Path(__file__).resolve().parent.parent

# An accelerator of the machine must not change what the tests see, and an
# inherited device count must not compete with ours.
os.environ["JAX_PLATFORMS"] = "cpu"
for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
  os.environ.pop(name, None)
# Read by jax here and in every process that a test starts.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "test_programs")
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# XLA compiles small programs two to four times as fast by its older emitters.
# Versions after that of jax 0.10 have no others, and refuse the flag.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def _is_quick(config):
  """Whether the long oracles stay out; with them all compiles as users do."""
  return config.option.markexpr == "not slow"


def pytest_configure(config):
  if _is_quick(config) and jax.__version_info__ < (0, 11):
    # Read at the first compilation, here and in processes that tests start.
    os.environ["XLA_FLAGS"] = OLD_EMITTERS


@pytest.fixture(scope="module")
def quick_programs(request):
  """For modules that compile more than they compute: XLA optimizes little.

  Nor does it in processes that they start, whose bits are compared.
  """
  if not _is_quick(request.config):
    yield
    return
  name = "jax_disable_most_optimizations"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(name.upper(), "1")
    jax.config.update(name, True)
    yield
    jax.config.update(name, False)


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
  """The folder of external data named by O1JAX_TEST_DATA."""
  if "O1JAX_TEST_DATA" not in os.environ:
    pytest.skip("O1JAX_TEST_DATA does not name the folder of external data")
  folder = pathlib.Path(os.environ["O1JAX_TEST_DATA"])
  if not folder.is_dir():
    pytest.fail(f"O1JAX_TEST_DATA names {folder}, which is not a folder")
  return folder


def _refuse_skip(report, name):
  """Turns a skip into a failure under CI=true."""
  expected_failure = hasattr(report, "wasxfail")
  if report.skipped and not expected_failure and os.environ.get("CI") == "true":
    reason = report.longrepr[2].removeprefix("Skipped: ")
    report.outcome = "failed"
    report.longrepr = f"{name} was skipped under CI=true: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  report = yield
  _refuse_skip(report, item.nodeid)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  report = yield
  _refuse_skip(report, collector.nodeid)
  return report
