"""A checkpoint as a folder that diffusers loads (or under official names), and published weights as a checkpoint.

python launch/export.py --checkpoint runs/demo --output exported
python launch/export.py --import DiT-XL-2-256x256.pt --config dit_xl_2_mup.yaml --output imported
torchrun ... launch/train.py --config dit_xl_2_mup.yaml run.init_from=imported
"""

import argparse
from pathlib import Path

from data.files import folder_once
from export.diffusers_folder import (
    card,
    check_output,
    refusals,
    without_parts,
    write_folder,
)
from export.names import Format
from export.read import check_import, read_published, write_checkpoint
from export.weight_files import PublishedWeights
from export.write import GIB, layout_of, write_weights
from launch.common import run
from trainer.build.engine import build_mup_table
from trainer.checkpoint.compatible import check_same_model, lasting
from trainer.checkpoint.find import find_checkpoint, read_meta
from trainer.config.load import load_config, parse
from trainer.errors import CheckpointError, ConfigError
from trainer.files import write_atomically
from trainer.parallel.dcp import TensorReader


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--checkpoint", type=Path, help="export this checkpoint, or a run folder's newest one")
    way.add_argument("--import", dest="source", type=Path, help="import these weights: a file, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", help="import: of the run that will start from the weights")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="export: which weights")
    parser.add_argument("--format", choices=("diffusers", "official"), default="diffusers", help="export: whose names")
    parser.add_argument(
        "--encoders", choices=("copy", "reference"), default="copy", help="export: in the folder, or by id"
    )
    parser.add_argument("--pipeline", choices=("auto", "own"), default="auto", help="export: stock where that is right")
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="export: largest file of weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) != (arguments.source is None):
        parser.error("--config goes with --import, and --import needs it")
    if arguments.max_shard_gib <= 0:
        parser.error(f"--max-shard-gib must be positive, got {arguments.max_shard_gib}")
    check_output(arguments.output)
    message = _import(arguments) if arguments.source is not None else _export(arguments)
    print(message)
    return 0


# -------------------------------------------------------------------------------------------------------------- export
def _export(arguments: argparse.Namespace) -> str:
    checkpoint = find_checkpoint(arguments.checkpoint)
    meta = read_meta(checkpoint)
    overrides = ["parallel.shard=0", *arguments.overrides]
    config = parse(meta["config"], f"the config of {checkpoint}", overrides)
    form: Format = arguments.format
    reasons = [*refusals(config, form), *(without_parts(config) if form == "diffusers" else ())]
    if reasons:
        raise ConfigError(f"{checkpoint} cannot be exported:\n  " + "\n  ".join(reasons))
    table = build_mup_table(config)
    check_same_model(meta, table.to_json(), checkpoint, rules=True)
    group = "model" if arguments.weights == "live" else f"ema_{config.ema.decays[0]}"
    reader = TensorReader(checkpoint)
    missing = sorted(set(lasting(table.rows)) - reader.entries(group).keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no {arguments.weights} weights of {missing[0]} ({len(missing)} are missing): "
            "try --weights ema or live, or another checkpoint"
        )
    with folder_once(arguments.output) as folder:
        own: list[str] = []
        if form == "diffusers":
            own = write_folder(config, folder, arguments.encoders, arguments.pipeline == "own")
            where, stem = folder / "transformer", "diffusion_pytorch_model"
        else:
            where, stem = folder, "model"
        limit = int(arguments.max_shard_gib * GIB)
        write_weights(reader, group, table, config, layout_of(config, table, form), where, stem, limit)
        text = card(config, meta, form, arguments.weights, own, arguments.encoders)
        write_atomically(folder / "README.md", text)
    pipeline = f", with a pipeline of its own: {'; '.join(own)}" if own else ""
    return f"the {arguments.weights} weights of {checkpoint}: {arguments.output}{pipeline}"


# -------------------------------------------------------------------------------------------------------------- import
def _import(arguments: argparse.Namespace) -> str:
    config = load_config(arguments.config, arguments.overrides)
    table = build_mup_table(config)
    source = PublishedWeights(arguments.source)
    form: Format = "diffusers" if any("transformer_blocks." in name for name in source.shapes) else "official"
    note = check_import(config, form, source)
    tensors = read_published(source, layout_of(config, table, form), config, table)
    with folder_once(arguments.output) as folder:
        write_checkpoint(folder, config, table, {f"model/{name}": tensor for name, tensor in tensors.items()})
    return f"{len(tensors)} parameters from {arguments.source} ({form} names): run.init_from={arguments.output}{note}"


if __name__ == "__main__":
    run(main)
