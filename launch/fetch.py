"""Bring the encoders that a config names, on a node with a network; jobs then run with HF_HUB_OFFLINE=1.

python launch/fetch.py --config mmdit_18b_mup.yaml [--to FOLDER] [section.key=value ...]

They go into the Hugging Face cache (HF_HOME), which all nodes must share, or into --to FOLDER, and then the paths to
set are printed. Only what training reads is fetched: configs, tokenizers, *.safetensors. A licence that must be
accepted on the hub's page needs HF_TOKEN.
"""

import argparse
from pathlib import Path

from transformers.utils.hub import snapshot_download

from data.config import NONE, AutoencoderConfig, TextEncoderConfig
from data.errors import DataError
from launch.common import run
from trainer.config.load import load_config

_READ = ("*.json", "*.safetensors", "*.model", "*.txt")


def fetch(key: str, path: str, subfolder: str | None, to: Path | None) -> Path:
    """Folder that holds the files which `path` has on the hub; DataError where they cannot be had."""
    # A diffusers pipeline keeps the tokenizer of text_encoder_3 in tokenizer_3.
    folders = (
        [""]
        if subfolder is None
        else [f"{part}/" for part in (subfolder, subfolder.replace("text_encoder", "tokenizer"))]
    )
    try:
        folder = Path(
            snapshot_download(
                path,
                local_dir=None if to is None else to / path,
                allow_patterns=[folder + pattern for folder in folders for pattern in _READ],
                ignore_patterns=["*.fp16*"],  # a second copy
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{key}: {path!r} is no local folder and cannot be had from the hub ({reason}); check the name, the "
            "network, HF_HUB_OFFLINE, and HF_TOKEN for a licence that must be accepted"
        ) from None
    if not any((folder / folders[0]).glob("*.safetensors")):
        raise DataError(
            f"{key}: {path!r} has no *.safetensors{f' in {subfolder}' if subfolder else ''}, and other weights are not "
            "read; of T5-v1.1-XXL stabilityai/stable-diffusion-3-medium-diffusers (subfolder text_encoder_3) and "
            "PixArt-alpha/PixArt-XL-2-512x512 (subfolder text_encoder) have them"
        )
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    parser.add_argument("--to", type=Path, help="folder, instead of the cache")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    named: dict[str, AutoencoderConfig | TextEncoderConfig] = {"autoencoder": config.autoencoder}
    if config.label_classes is None:
        named["text_encoder"] = config.text_encoder
    paths = {f"{section}.path": (encoder.path, encoder.subfolder) for section, encoder in named.items()}
    if config.projector is not None:
        paths["objective.repa_encoder"] = config.objective.repa_encoder, None
    for key, (path, subfolder) in paths.items():
        if path == NONE:
            print(f"{key}: none is named")
        elif Path(path).is_dir():
            print(f"{key}: {path} is a local folder")
        else:
            folder = fetch(key, path, subfolder, arguments.to)
            print(f"{key}: {folder}" if arguments.to is None else f"{key}={folder}")
    return 0


if __name__ == "__main__":
    run(main)
