"""A checkpoint's weights under the names of diffusers or of the official code."""

from pathlib import Path

from trainer.checkpoint.compatible import lasting
from trainer.config.schema import TrainConfig
from trainer.mup.table import MuTable
from trainer.parallel.dcp import TensorReader

from .diffusers_folder import position_table
from .names import Format, Layout, fold, layout
from .weight_files import SafetensorsWriter

GIB = 2**30


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
