"""Export a checkpoint as a folder that diffusers loads (or under official names); import published weights.

python launch/export.py --checkpoint runs/demo --output exported
python launch/export.py --checkpoint runs/demo --output exported --push user/name --license apache-2.0
python launch/export.py --import DiT-XL-2-256x256.pt --config dit_xl_2_mup.yaml --output imported
torchrun ... launch/train.py --config dit_xl_2_mup.yaml run.init_from=imported
"""

from pathlib import Path

from launch.common import command, open_checkpoint, run
from launch.processes import importing
from trainer.config.load import load_config
from trainer.errors import ConfigError


def main() -> int:
    parser = command(__doc__, config=False)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--checkpoint", type=Path, help="export this checkpoint, or the newest of a run folder")
    way.add_argument("--import", dest="source", type=Path, help="import these weights: a file, or a folder of files")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", help="import: config of the run that will start from the weights")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="export: which weights")
    parser.add_argument("--format", choices=("diffusers", "official"), default="diffusers", help="export: whose names")
    parser.add_argument(
        "--encoders", choices=("copy", "reference"), default="copy", help="export: copied into the folder, or by id"
    )
    parser.add_argument(
        "--pipeline", choices=("auto", "own"), default="auto", help="export: diffusers' own where it samples the same"
    )
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="export: largest file of weights (default: 5)")
    parser.add_argument("--license", help="export: licence in the card, as hubs name it: apache-2.0, other, ...")
    parser.add_argument(
        "--transferred", type=Path, metavar="CONFIG", help="export: what search.py transfer wrote, for the card to tell"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="export: send the folder to the Hub, with HF_TOKEN's token")
    parser.add_argument(
        "--private", action="store_true", help="push: to a private repository alone, made where there is none"
    )
    arguments = parser.parse_args()
    if (arguments.config is None) != (arguments.source is None):
        parser.error("--config goes with --import, and --import needs it")
    if arguments.max_shard_gib <= 0:
        parser.error(f"--max-shard-gib must be positive, got {arguments.max_shard_gib}")
    if arguments.source is not None and (arguments.push or arguments.license or arguments.transferred):
        parser.error("--push, --license and --transferred go with --checkpoint")
    if arguments.private and not arguments.push:
        parser.error("--private goes with --push")
    if arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists already: name a new folder, or remove it")
    if arguments.source is not None:
        config = load_config(arguments.config, arguments.overrides)
        with importing():
            from export.read import import_weights

        print(import_weights(config, arguments.source, arguments.output))
        return 0
    checkpoint, meta, config = open_checkpoint(arguments.checkpoint, arguments.overrides)
    with importing():
        from export.push import check_push, push
        from export.write import export_checkpoint

    token = check_push(arguments.push, config, arguments.encoders) if arguments.push else ""
    message = export_checkpoint(
        checkpoint, meta, config, arguments.output,
        weights=arguments.weights, form=arguments.format, encoders=arguments.encoders,
        own_pipeline=arguments.pipeline == "own", max_shard_gib=arguments.max_shard_gib,
        license=arguments.license, transferred=arguments.transferred,
    )  # fmt: skip
    print(message)
    if arguments.push:
        print(f"pushed to {push(arguments.output, arguments.push, arguments.private, token)}")
    return 0


if __name__ == "__main__":
    run(main)
