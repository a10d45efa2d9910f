"""Download the encoders that a config names, on a node with a network; jobs then run with HF_HUB_OFFLINE=1.

python launch/fetch.py --config mmdit_18b_mup.yaml [--to FOLDER] [section.key=value ...]

They go into the Hugging Face cache (HF_HOME), which all nodes must share, or into --to FOLDER; then the overrides to
use are printed. Only what training reads is fetched: configs, tokenizers, *.safetensors. Weights whose licence must be
accepted on the hub's page need HF_TOKEN.
"""

from pathlib import Path

from data.config import NONE, AutoencoderConfig, TextModelConfig
from launch.common import command, run
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig


def encoder_paths(config: TrainConfig) -> dict[str, tuple[str, str | None]]:
    """{key: (folder or name on the hub, subfolder)} of all encoders that a config names, or "none"."""
    named: dict[str, AutoencoderConfig | TextModelConfig] = {"autoencoder": config.autoencoder}
    if config.label_classes is None:
        named["text_encoder"] = config.text_encoder
        named |= {f"text_encoder.more.{number}": one for number, one in enumerate(config.text_encoder.more)}
    paths = {f"{section}.path": (encoder.path, encoder.subfolder) for section, encoder in named.items()}
    if config.projector is not None:
        paths["objective.repa_encoder"] = config.objective.repa_encoder, None
    return paths


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--to", type=Path, help="a folder instead of the cache")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    from data.encoders.fetch import fetch

    for key, (path, subfolder) in encoder_paths(config).items():
        if path == NONE:
            print(f"{key}: none is named")
        elif Path(path).is_dir():
            print(f"{key}: {path} is a local folder")
        else:
            folder = fetch(key, path, subfolder, arguments.to)
            is_override = arguments.to is not None and not key.startswith("text_encoder.more.")  # a key in a list
            print(f"{key}={folder}" if is_override else f"{key}: {folder}")
    return 0


if __name__ == "__main__":
    run(main)
