import re
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "accelerate>=1.3",
    "bitsandbytes>=0.50; platform_system == 'Linux'",
    "datasets>=3.2",
    "filelock>=3.12",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "transformers>=4.48",
    "xxhash>=3.0",
]

PLOTS = "matplotlib>=3.9"

ROOT = Path(__file__).parent
# The one place of the version; importing it would need torch.
SOURCE = (ROOT / "lowrank_optim" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[0]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]

setup(
    name="lowrank-optim",
    version=VERSION,
    description="Memory-efficient LLM pretraining: exact low-rank optimizers with torch.optim APIs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ is a source root without an __init__.py: as a package it would shadow the
    # Hugging Face distribution "kernels", which transformers probes by that very name.
    packages=find_packages(include=["lowrank_optim*"]) + find_packages("kernels"),
    package_dir={"lowrank_kernels": "kernels/lowrank_kernels"},
    package_data={
        "lowrank_optim": ["py.typed", "configs/*.yaml", "configs/accelerate/*.yaml"],
        "lowrank_kernels": ["py.typed"],
    },
    # On Linux torch brings triton.
    install_requires=["torch>=2.6", "numpy>=1.26"],
    extras_require={
        "train": TRAIN,
        "test": [
            *TRAIN,
            *DOCS,
            "hypothesis>=6.120",
            PLOTS,
            "mypy>=1.14",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=77",
            # The CPU builds of torch bring none.
            "triton>=3.2; platform_system == 'Linux'",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": DOCS,
        "plots": [PLOTS],
        # Beside `train`, for the examples of Lightning and PEFT; lowrank_optim.integrations needs transformers alone.
        "integrations": ["lightning>=2.5", "peft>=0.14"],
        "peers": ["galore-torch==1.0", "apollo-torch==1.0.3", "fira==1.0.2"],
    },
    entry_points={
        "console_scripts": [
            "lowrank-memory = lowrank_optim.memory.cli:main",
            "lowrank-train = lowrank_optim.cli.main:main",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
