"""Which other code bases can express a model of ours: diffusers, or the official repositories. No torch."""

from collections.abc import Iterator
from typing import Literal, cast, get_args

from models.configs import MMDiTConfig, ShippedConfig
from trainer.config.schema import TrainConfig

Format = Literal["diffusers", "official"]
MOST_TEXT_ENCODERS = 4  # of export.pipeline, which torch is needed to import
FLUX = "FluxTransformer2DModel"
TWINS = {"mmdit": "SD3Transformer2DModel", "pixart": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel"}


def shipped(config: TrainConfig) -> ShippedConfig:
    """The model's config as one of the kinds that have names here; a kind that came later is refused by its name."""
    return cast(ShippedConfig, config.model)


def twin_of(model: ShippedConfig) -> str | None:
    """The class of diffusers that computes as the model does, or comes nearest; None where none is like it."""
    if model.kind == "mmdit" and model.positions == "rope" and model.single_depth:
        return FLUX
    return TWINS.get(model.kind)


def refusals(config: TrainConfig, form: Format) -> Iterator[str]:
    """Why a model of this config would not compute the same in the other code base, one reason each."""
    model = shipped(config)
    if model.route is not None and model.route.fuse == "sprint":
        yield "no other code base has the layer of model.route.fuse sprint: sample it with launch/sample.py"
        return
    if form == "diffusers":
        if (twin := twin_of(model)) is None:
            yield f"diffusers has no model like model.kind {model.kind}; --format official writes the official names"
            return
        if config.objective.predict != "velocity":
            yield (
                f"the pipelines of diffusers take a flow's output for the velocity, this model's is "
                f"{config.objective.predict} (objective.predict): sample it with launch/sample.py"
            )
        if config.sample.guidance_by == "route":
            yield (
                "no pipeline of diffusers has a route to guide by (sample.guidance_by): sample it with "
                "launch/sample.py, or add sample.guidance_by=condition and a sample.guidance that fits it"
            )
        if model.kind == "mmdit":
            yield from unlike(model, twin)
        if config.label_classes is None and (count := len(config.text_encoder.models)) > MOST_TEXT_ENCODERS:
            yield (
                f"the pipelines that exports write have {MOST_TEXT_ENCODERS} text encoders at most, this model has "
                f"{count} (text_encoder.more): sample it with launch/sample.py"
            )
        if model.mlp_ratio != 4:
            yield f"{twin} has MLPs of 4 times the width, this model of model.mlp_ratio {model.mlp_ratio}"
        if model.time_freq_shift != (shift := 1.0 if model.kind == "dit" else 0.0):
            hint = "; --format official writes the official names" if model.kind == "dit" else ""
            yield (
                f"{twin} computes time with frequencies i / (128 - {shift:g}), this model was trained with "
                f"model.time_freq_shift {model.time_freq_shift:g}, and would sample wrongly there{hint}"
            )
    else:
        if model.kind not in ("dit", "uvit"):
            yield f"model.kind {model.kind} goes to diffusers: leave out --format official"
        elif model.time_freq_shift != 0:
            yield (
                "the official code computes time with frequencies i / 128, this model was trained with "
                f"model.time_freq_shift {model.time_freq_shift:g}, and would sample wrongly there"
            )


def unlike(model: MMDiTConfig, twin: str) -> Iterator[str]:
    """What of an MMDiT that class of diffusers does not have, by the config's keys."""
    if model.mlp != "gelu":
        yield f"{twin} has MLPs with GELU, this model model.mlp {model.mlp}"
    if twin == FLUX:
        if not model.qk_norm:
            yield f"{twin} normalises queries and keys, this model has model.qk_norm false"
        return
    if model.single_depth:
        yield (
            f"{twin} has two streams in every block, this model model.single_depth {model.single_depth} "
            f"({FLUX} has both, with model.positions rope)"
        )
    if model.positions != "sincos":
        yield (
            f"{twin} adds a table of positions, this model has model.positions {model.positions} ({FLUX} has it, with "
            "model.single_depth of at least 1)"
        )


def export_note(config: TrainConfig) -> str | None:
    """What to know before training: that diffusers will not take the model, and why. None where it will."""
    reasons = {form: [*refusals(config, form)] for form in get_args(Format)}
    if not reasons["diffusers"]:
        return None
    ways = "nowhere" if reasons["official"] else "under official names alone"
    return f"note: launch/export.py can write this model {ways}: {'; '.join(reasons['diffusers'])}"
