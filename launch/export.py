"""A checkpoint as a folder that diffusers loads (or under official names), and published weights as a checkpoint.

python launch/export.py --checkpoint runs/demo --output exported
python launch/export.py --import DiT-XL-2-256x256.pt --config dit_xl_2_mup.yaml --output imported
torchrun ... launch/train.py --config dit_xl_2_mup.yaml run.init_from=imported
"""

import argparse
import json
import warnings
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.files import folder_once
from launch.common import run
from launch.export_files import PublishedWeights, SafetensorsWriter
from launch.export_folder import (
    card,
    check_output,
    position_table,
    refusals,
    twin_config,
    without_parts,
    write_folder,
)
from launch.export_names import LAYOUTS, Format, Layout, fold, layout
from trainer.build import build_mup_table
from trainer.checkpoint import (
    META,
    CheckpointError,
    check_same_model,
    find_checkpoint,
    lasting,
    read_meta,
    write_atomically,
)
from trainer.config import ConfigError, TrainConfig, load_config, parse, plain
from trainer.mup.table import MuTable
from trainer.parallel.dcp import TensorReader

GIB = 2**30
SHOWN = 20  # names that an error lists
KEYS = {
    "attention_head_dim": "model.head_dim",
    "sample_size": "model.pos_embed_base_size x model.patch_size",
    "interpolation_scale": "model.pos_embed_interpolation",
}
TABLE_TOLERANCE = 2e-3  # of positions in [-1, 1], which may be stored in 16 bits


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


def layout_of(config: TrainConfig, table: MuTable, form: Format) -> Layout:
    shapes = {name: table.rows[name].shape for name in lasting(table.rows)}
    return layout(
        config.model, config.autoencoder.channels, shapes, form, config.latent_size // config.model.patch_size
    )


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


def write_weights(
    reader: TensorReader,
    group: str,
    table: MuTable,
    config: TrainConfig,
    to: Layout,
    folder: Path,
    stem: str,
    limit: int,
) -> None:
    """One parameter of ours at a time; no more than one is in memory."""
    dtype = next(iter(reader.entries(group).values()))[1]
    with SafetensorsWriter(folder, stem, to.shapes, dtype, limit) as writer:
        for name in to.ours:
            values = reader.read(f"{group}/{name}").reshape(-1)
            if (factor := fold(table, name)) != 1.0:
                values *= factor
            for part in to.runs:
                if part.ours == name:
                    writer.write(part.theirs, part.at, values[part.ours_at :][: part.size])
        for name in to.tables:
            writer.write(name, 0, position_table(config).to(dtype).reshape(-1))


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


def check_import(config: TrainConfig, form: Format, source: PublishedWeights) -> str:
    """Raise ConfigError where the config would compute something else with these weights than their own code does,
    as far as that can be seen; returns a note on what cannot."""
    model = config.model
    if (model.kind, form) not in LAYOUTS:
        raise ConfigError(f"{source.path} has the names of diffusers, which has no model like model.kind {model.kind}")
    problems = []
    if model.time_freq_shift and (model.kind, form) != ("dit", "diffusers"):
        problems.append(f"model.time_freq_shift is {model.time_freq_shift:g}: these weights go with 0")
    if form == "diffusers":
        sample_size = source.config.get("sample_size")
        stored = {"attention_head_dim": source.config.get("attention_head_dim")}
        if model.kind != "dit":  # whose positions follow the image
            stored["sample_size"] = sample_size
        if model.kind == "pixart" and sample_size is not None:
            scale = source.config.get("interpolation_scale")
            stored["interpolation_scale"] = max(sample_size // 64, 1) if scale is None else scale
        ours = twin_config(config)
        problems += [
            f"{key} is {value} in its config.json, and {ours[key]} by this config ({KEYS[key]})"
            for key, value in stored.items()
            if value is not None and value != ours[key]
        ]
    if problems:
        raise ConfigError(f"{source.path} does not fit the config:\n  " + "\n  ".join(problems))
    if (model.kind, form) == ("dit", "diffusers"):
        return (
            f"\nmodel.time_freq_shift is {model.time_freq_shift:g}: right for weights that were trained with it "
            "(0: the official code's, also where others converted them), while diffusers always computes with 1"
        )
    return ""


def read_published(source: PublishedWeights, to: Layout, config: TrainConfig, table: MuTable) -> dict[str, Tensor]:
    """Our parameters by name, unfolded; one CheckpointError names all that is missing, unknown or of another shape."""
    problems = [
        f"missing: {name}" for name in dict.fromkeys(run.theirs for run in to.runs) if name not in source.shapes
    ]
    for name, shape in source.shapes.items():
        if name not in to.shapes:
            if not any(fnmatchcase(name, pattern) for pattern in to.unread):
                problems.append(f"unknown: {name} {list(shape)}")
        elif shape != to.shapes[name]:
            problems.append(f"shape: {name} is {list(shape)}, by the config {list(to.shapes[name])}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{source.path} does not fit the config:\n  " + "\n  ".join(problems[:SHOWN]) + more)
    tensors = {name: torch.empty(shape).reshape(-1) for name, shape in to.ours.items()}
    filled: set[tuple[str, int]] = set()
    for name in to.shapes.keys() & source.shapes.keys():
        values = source.read(name).float()
        if name in to.tables and not torch.allclose(values, position_table(config), atol=TABLE_TOLERANCE):
            raise CheckpointError(
                f"{source.path}: the positions {name} are not those of the config; compare data.resolution, "
                "model.pos_embed_base_size and what else model.pos_embed_* there is"
            )
        values = values.reshape(-1)
        for part in to.runs:
            if part.theirs != name:
                continue
            ours, own = tensors[part.ours][part.ours_at :][: part.size], values[part.at :][: part.size]
            if (part.ours, part.ours_at) in filled and not torch.equal(ours, own):
                raise CheckpointError(f"{source.path}: {name} differs between blocks, where this model has one of it")
            ours.copy_(own)
            filled.add((part.ours, part.ours_at))
    return {name: (tensor / fold(table, name)).reshape(to.ours[name]) for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, config: TrainConfig, table: MuTable, tensors: dict[str, Tensor]) -> None:
    """Weights alone, under their full names ("model/final.weight"), as run.init_from reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it writes in one process, which is what is meant
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    meta = {
        "config": plain(config),
        "mup": table.to_json(),
        "fingerprints": {},
        "versions": {"torch": version("torch")},
        "commit": "",
        "step": 0,
        "reads": [],
    }
    write_atomically(folder / META, json.dumps(meta))


if __name__ == "__main__":
    run(main)
