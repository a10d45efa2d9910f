"""Published weights become a checkpoint that a run starts from."""

import warnings
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.files import folder_once
from trainer.build.engine import build_mup_table
from trainer.checkpoint.checksums import META, digest_files
from trainer.checkpoint.meta import seal
from trainer.config.keys import plain
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.files import write_atomically
from trainer.mup.table import MuTable

from .diffusers_folder import position_table, twin_config
from .forms import TWINS, Format, shipped, twin_of, unlike
from .names import LAYOUTS, Layout, fold
from .weight_files import PublishedWeights
from .write import layout_of

SHOWN = 20  # names that an error lists
KEYS = {
    "attention_head_dim": "model.head_dim",
    "sample_size": "model.pos_embed_base_size x model.patch_size",
    "interpolation_scale": "model.pos_embed_interpolation",
    "axes_dims_rope": "model.head_dim: half for each axis of an image, and none for frames",
}
TABLE_TOLERANCE = 2e-3  # of positions in [-1, 1], which may be stored in 16 bits


def import_weights(config: TrainConfig, weights: Path, output: Path) -> str:
    """Write the checkpoint folder `output`, whole or not at all; returns a line that says what is in it.

    config: of the run that will start from the weights. Raises ConfigError and CheckpointError where they do not fit.
    """
    table = build_mup_table(config)
    source = PublishedWeights(weights)
    form: Format = "diffusers" if any("transformer_blocks." in name for name in source.shapes) else "official"
    note = check_import(config, form, source)
    tensors = read_published(source, layout_of(config, table, form), config, table)
    with folder_once(output) as folder:
        write_checkpoint(folder, config, table, {f"model/{name}": tensor for name, tensor in tensors.items()})
    return (
        f"{len(tensors)} parameters from {weights} ({form} names; read: {source.choice}): run.init_from={output}{note}"
    )


def check_import(config: TrainConfig, form: Format, source: PublishedWeights) -> str:
    """Raise ConfigError where the config would compute something else with these weights than their own code does, as
    far as that can be seen. Returns a note on what cannot be seen."""
    model = shipped(config)
    if (model.kind, form) not in LAYOUTS:
        raise ConfigError(f"{source.path} has the names of diffusers, which has no model like model.kind {model.kind}")
    problems = []
    if config.objective.predict != "velocity":
        problems.append(
            f"objective.predict is {config.objective.predict}: published weights of these models predict velocity or "
            "noise, leave it velocity"
        )
    if model.kind == "mmdit":
        problems += unlike(model, (form == "diffusers" and twin_of(model)) or TWINS["mmdit"])
    if model.route is not None and model.route.fuse == "sprint":
        problems.append("model.route.fuse is sprint: no published weights have its layer, leave it none")
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
        if "axes_dims_rope" in ours:
            stored["axes_dims_rope"] = source.config.get("axes_dims_rope")
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
    """Our parameters by name, unfolded. One CheckpointError names all that is missing, unknown or of another shape."""
    problems = [
        f"missing: {name}" for name in dict.fromkeys(piece.theirs for piece in to.slices) if name not in source.shapes
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
        for piece in to.slices:
            if piece.theirs != name:
                continue
            ours, own = tensors[piece.ours][piece.ours_at :][: piece.size], values[piece.at :][: piece.size]
            if (piece.ours, piece.ours_at) in filled and not torch.equal(ours, own):
                raise CheckpointError(f"{source.path}: {name} differs between blocks, where this model has one of it")
            ours.copy_(own)
            filled.add((piece.ours, piece.ours_at))
    return {name: (tensor / fold(table, name)).reshape(to.ours[name]) for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, config: TrainConfig, table: MuTable, tensors: dict[str, Tensor]) -> None:
    """Write weights alone, under their full names ("model/final.weight"), as run.init_from reads them."""
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
        "files": digest_files(folder),
    }
    write_atomically(folder / META, seal(meta))
