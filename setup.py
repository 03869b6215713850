"""Metadata of the package; tools are configured in pyproject.toml.

The dependencies have floors and no ceilings. The versions that the tests ran
with stand in requirements/ci-311.txt and ci-312.txt.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

# Read as text: importing the package would need jax.
VERSION = re.search(
  r'^__version__ = "(.+)"$', (ROOT / "o1jax" / "__init__.py").read_text(), re.M
).group(1)

CORE = [
  "jax>=0.10",
  "numpy>=2.0",
  "flax>=0.12.8",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "chex>=0.1.92",
  "grain>=0.2.18",
  "tensorflow-datasets>=4.9.10",
  "importlib_resources",
  "sentencepiece>=0.2.3",
  "ml-collections>=1.1.0",
  "absl-py>=2.5",
  "etils[epath]>=1.15",
  "tensorboardX>=2.6.5",
  "rich>=13",
]

EXTRAS = {
  "gpu": ["jax[cuda13]"],
  "gpu12": ["jax[cuda12]"],
  "tpu": ["jax[tpu]", "gcsfs"],
  "gcp": ["gcsfs"],
  "hf": [
    "safetensors>=0.7",
    "tokenizers>=0.22",
    "jinja2",
    "huggingface_hub",
  ],
  "math": ["math-verify>=0.9"],
  "tasks": ["reasoning-gym>=0.1.25"],
  "tb": ["tensorboard"],
  "wandb": ["wandb"],
  "notebooks": ["nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"],
  # What the tests need, so that none is skipped for a missing package.
  "dev": [
    "pytest>=9",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mctx",
    "tensorboard",
    "nbclient",
    "nbformat",
    "ipykernel",
  ],
}
EXTRAS["all"] = sorted(
  {
    requirement
    for name, requirements in EXTRAS.items()
    if name not in ("gpu", "gpu12", "tpu")
    for requirement in requirements
  }
)

setup(
  name="o1jax",
  version=VERSION,
  description="Search and learning for reasoning language models, in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=find_packages(include=["o1jax", "o1jax.*"]),
  package_data={"o1jax": ["py.typed", "assets/**/*"]},
  python_requires=">=3.11",
  install_requires=CORE,
  extras_require=EXTRAS,
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
