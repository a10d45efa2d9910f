"""Bring the encoders that a config names, on a node with a network; jobs then run with HF_HUB_OFFLINE=1.

python launch/fetch.py --config mmdit_18b_mup.yaml [--to FOLDER] [section.key=value ...]

They go into the Hugging Face cache (HF_HOME), which all nodes must share, or into --to FOLDER; then the two paths to
set are printed. Only what training reads is fetched: configs, tokenizers, *.safetensors. A licence that must be
accepted on the hub's page needs HF_TOKEN.
"""

import argparse
from pathlib import Path

from data.config import NONE
from data.encoders import fetch
from launch.common import run
from trainer.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    parser.add_argument("--to", type=Path, help="folder, instead of the cache")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    named = {"autoencoder": config.autoencoder}
    if config.label_classes is None:
        named["text_encoder"] = config.text_encoder
    for section, encoder in named.items():
        if encoder.path == NONE:
            print(f"{section}: none is named")
        elif Path(encoder.path).is_dir():
            print(f"{section}: {encoder.path} is a local folder")
        else:
            folder = fetch(f"{section}.path", encoder.path, encoder.subfolder, arguments.to)
            print(f"{section}: {folder}" if arguments.to is None else f"{section}.path={folder}")
    return 0


if __name__ == "__main__":
    run(main)
