"""A checkpoint as a folder under the names of diffusers or of the official code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from data.files import folder_once
from trainer.build.engine import build_mup_table
from trainer.checkpoint.compatible import check_same_model, lasting
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.mup.table import MuTable
from trainer.parallel.dcp import TensorReader

from .card import About, check_about, write_card
from .diffusers_folder import Encoders, position_table, without_parts, write_folder
from .forms import Format, refusals
from .names import Layout, fold, layout
from .weight_files import SafetensorsWriter

GIB = 2**30


def export_checkpoint(
    checkpoint: Path,
    meta: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    weights: Literal["ema", "live"] = "ema",
    form: Format = "diffusers",
    encoders: Encoders = "copy",
    own_pipeline: bool = False,
    max_shard_gib: float = 5.0,
    license: str | None = None,
    transferred: Path | None = None,
) -> str:
    """Write the folder `output` whole or not at all; returns a line that says what is in it.

    meta, config: of the checkpoint. license, transferred: see card.About. Raises ConfigError where the other code base
    cannot express the model or the card would tell what is not so, and CheckpointError where weights are missing.
    """
    reasons = [*refusals(config, form), *(without_parts(config) if form == "diffusers" else ())]
    if reasons:
        raise ConfigError(f"{checkpoint} cannot be exported:\n  " + "\n  ".join(reasons))
    about = About(checkpoint, license, transferred)
    check_about(about, meta)
    table = build_mup_table(config)
    check_same_model(meta, table.to_json(), checkpoint, rules=True)
    group = "model" if weights == "live" else f"ema_{config.ema.decays[0]}"
    reader = TensorReader(checkpoint)
    found = reader.entries(group)
    missing = sorted(set(lasting(table.rows)) - found.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no {weights} weights of {missing[0]} ({len(missing)} are missing): "
            "try --weights ema or live, or another checkpoint"
        )
    for name in lasting(table.rows):
        if (shape := found[name][0]) != tuple(table.rows[name].shape):
            raise CheckpointError(f"{checkpoint}: {name} has the shape {shape}, by its table {table.rows[name].shape}")
    with folder_once(output) as folder:
        own: list[str] = []
        if form == "diffusers":
            own = write_folder(config, folder, encoders, own_pipeline)
            where, stem = folder / "transformer", "diffusion_pytorch_model"
        else:
            where, stem = folder, "model"
        limit = int(max_shard_gib * GIB)
        write_weights(reader, group, table, config, layout_of(config, table, form), where, stem, limit)
        write_card(folder, config, meta, about, form, weights, own, encoders)
    pipeline = f", with a pipeline of its own: {'; '.join(own)}" if own else ""
    return f"the {weights} weights of {checkpoint}: {output}{pipeline}"


def layout_of(config: TrainConfig, table: MuTable, form: Format) -> Layout:
    shapes = {name: table.rows[name].shape for name in lasting(table.rows)}
    return layout(
        config.model, config.autoencoder.channels, shapes, form, config.latent_size // config.model.patch_size
    )


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
    """Write the transformer's weights, one parameter at a time: no more than one is in memory."""
    dtype = next(iter(reader.entries(group).values()))[1]
    with SafetensorsWriter(folder, stem, to.shapes, dtype, limit) as writer:
        for name in to.ours:
            values = reader.read(f"{group}/{name}").reshape(-1)
            if (factor := fold(table, name)) != 1.0:
                values *= factor
            for piece in to.slices:
                if piece.ours == name:
                    writer.write(piece.theirs, piece.at, values[piece.ours_at :][: piece.size])
        for name in to.tables:
            writer.write(name, 0, position_table(config).to(dtype).reshape(-1))
