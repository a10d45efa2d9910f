"""From a checkpoint: the model ready to compute with, and images from prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.precomputed_format import check_images

from ..checkpoint.compatible import check_usable, lasting
from ..checkpoint.meta import read_meta
from ..config.resolve import Resolved, resolve
from ..config.schema import TrainConfig
from ..diffusion.ddpm import DDPM
from ..diffusion.flow import RectifiedFlow
from ..errors import CheckpointError
from ..evaluate.generate import Generator, images_from_prompts
from ..input.encoding import Encoders
from ..mup.table import MuTable
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..parallel.precision import without_fp8
from .engine import build_engine, build_mup_table, build_objective, build_route, build_sampler


def image_generator(config: TrainConfig, engine: Engine, encoders: Encoders, resolved: Resolved) -> Generator:
    """Images by the weights that the engine's model has when it is called."""
    return Generator(
        engine.model,
        encoders.encode_prompts,
        encoders.decode,
        (config.autoencoder.channels, config.latent_size, config.latent_size),
        build_sampler(config, resolved),
        config.sample.guidance,
        config.sample.guidance_channels,
        encoders.device,
        build_route(config) if config.sample.guidance_by == "route" else None,
    )


def sample_images(generate: Generator, world: World, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """uint8 [len(prompts), H, W, 3] on every rank; the ranks share the work."""
    return images_from_prompts(generate, prompts, seed, world.control)


@dataclasses.dataclass(frozen=True)
class Inference:
    """The EMA (or live) weights of a checkpoint, ready to compute with."""

    config: TrainConfig
    table: MuTable
    model: torch.nn.Module
    objective: RectifiedFlow | DDPM
    encoders: Encoders
    images: Callable[[Sequence[str], int], np.ndarray]
    """(prompts, seed) -> uint8 [n, H, W, 3] on every rank."""
    generate: Generator
    """One batch of this rank; all ranks call it equally often."""


def build_inference(
    config: TrainConfig, checkpoint: Path, world: World, weights: Literal["ema", "live"] = "ema"
) -> Inference:
    """Load the weights of a checkpoint that was trained with `config`, the same one on all ranks (see find_checkpoint,
    which verifies it). Raises CheckpointError where it has none that can be used, DataError where an encoder cannot
    be."""
    if config.data.synthetic:
        raise CheckpointError(f"{checkpoint} was trained on synthetic data: there is no text encoder to prompt")
    check_images(config.autoencoder, config.text_encoder, config.label_classes)
    resolved = resolve(config, world.size)
    table = build_mup_table(config)
    check_usable(read_meta(checkpoint), table.to_json(), config.objective.predict, checkpoint)
    encoders = Encoders(config, world)
    _check_text_encoder(encoders, checkpoint, config.text_encoder.path)
    # Compiling takes longer than what it saves in a few images: only where it is asked for.
    # So is fp8 for training: it saves time only where it is compiled.
    precision = config.parallel.precision and without_fp8(config.parallel.precision)
    eager = config.parallel.model_copy(update={"compile": bool(config.parallel.compile), "precision": precision})
    engine = build_engine(config.model_copy(update={"parallel": eager}), table, world)
    if weights == "live" and read_meta(checkpoint).get("averages_only"):
        raise CheckpointError(f"{checkpoint} is a snapshot, which holds EMA weights alone: there are no live ones")
    group = f"ema_{config.ema.decays[0]}" if weights == "ema" else "model"
    engine.load_weights(checkpoint, group, lasting(table.rows))
    generate = image_generator(config, engine, encoders, resolved)
    return Inference(
        config=config,
        table=table,
        model=engine.model,
        objective=build_objective(config, resolved),
        encoders=encoders,
        images=partial(sample_images, generate, world),
        generate=generate,
    )


def _check_text_encoder(encoders: Encoders, checkpoint: Path, path: str) -> None:
    trained, present = read_meta(checkpoint)["fingerprints"], encoders.fingerprints()
    for part in ("text_encoder", "text_encoder_weights"):
        if part in trained and present.get(part) not in (None, trained[part]):
            raise CheckpointError(
                f"text_encoder.path {path} holds another text encoder than {checkpoint} was trained with, or damaged "
                "files: name that one, or fetch it again"
            )
