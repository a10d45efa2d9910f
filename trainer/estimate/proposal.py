"""A first config from what a person knows: data, GPUs, hours, resolution, text encoder."""

import json
import math
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.files import parse_json

from ..build.flops import image_flops
from ..build.meta import meta_model
from ..config.load import load_config
from ..config.schema import TrainConfig
from ..errors import ConfigError
from .cluster import Cluster
from .report import describe, estimate
from .right_size import PAPER
from .simulation import profile

SHIPPED = "sd3"  # the encoder that the shipped configs name
MFU = 0.2  # assumed until a model is chosen: the text encoder runs as well
TRAINING = 0.9  # share of the hours: validation, samples and saves take the rest
LARGER = 2  # times the parameters that are best for the compute: only their order of magnitude is known
# Without a GPU: twice the base width where the hours hold so many steps of it, else the base width.
SMALL_STEPS, SMALL_CAPTION = 600, 32
SMALL_SHARE = 0.4  # of a matrix product's rate; width 128 reached 0.3 to 0.7 on two cores with other work (2026-12-01)
FITTING = (
    f"the largest of those to choose from that suits the compute and fits: {PAPER} says how many parameters that is, "
    "to an order of magnitude (another model and autoencoder)"
)


class Wish(NamedTuple):
    """data: as data.shards. gpus: 0 for a machine without. encoder: a folder, or SHIPPED. resolution: pixels of a
    side."""

    data: str
    gpus: int
    hours: float
    resolution: int
    encoder: str


class Value(NamedTuple):
    """A key of the config, and why it has this value."""

    key: str
    value: Any
    why: str

    @property
    def override(self) -> str:
        return f"{self.key}={json.dumps(self.value)}"


class Proposal(NamedTuple):
    """text: of the config's file. page: its estimate, as launch/estimate.py prints it."""

    base: str
    text: str
    page: str


def propose(wish: Wish, cluster: Cluster, bases: Sequence[str], name: str) -> Proposal:
    """The config that fits a wish best. bases: names of configs that it may extend, the largest model first; the first
    that suits the compute and fits into memory is taken. name: of the config's file, without .yaml. Raises ConfigError
    where none fits."""
    values = values_of(wish, name)
    overrides = [value.override for value in values]
    for base in suited(bases, overrides, wish.hours * 3600 * cluster.gpus * cluster.card.peak_tflops * 1e12 * MFU):
        config = load_config(base, overrides)
        simulated = profile(config, cluster.gpus)
        found = estimate(config, cluster, simulated)
        if not (found["memory_gib"]["fits"] or found["memory_cached_gib"]["fits"]):
            continue
        timed = found["time" if found["memory_gib"]["fits"] else "time_cached"]
        steps = two_digits(TRAINING * wish.hours * 3600 / timed["step_s"])
        if steps < 10:
            raise ConfigError(
                f"{wish.hours:g} hours hold {steps} steps of {base}: expected 10 at least; give more hours"
            )
        values += _lasting(config, steps, wish.hours, timed["step_s"])
        config = load_config(base, [value.override for value in values])
        page = describe(estimate(config, cluster, simulated), cluster)
        return Proposal(base, _text(base, FITTING, values, page), page)
    raise ConfigError(
        f"none of {', '.join(bases)} fits into the {cluster.card.memory_gb:g} GB of {cluster.gpus} GPUs at "
        f"{wish.resolution} pixels: expected more GPUs, or a smaller resolution"
    )


def propose_small(wish: Wish, base: str, name: str) -> Proposal:
    """The config for a machine without a GPU. base: of a small model. name: of the config's file, without .yaml. Raises
    ConfigError."""
    if wish.encoder == SHIPPED:
        raise ConfigError(
            f"the text encoder of {SHIPPED} has 4.8 B parameters, too many for a machine without a GPU: expected the "
            "folder of a small one (make setup brings .cache/minilm), or the number of GPUs of another machine"
        )
    values = [
        *values_of(wish, name),
        Value("text_encoder.max_length", SMALL_CAPTION, "tokens of a caption; the rest is cut"),
    ]
    given = load_config(base)
    patches = wish.resolution // (given.autoencoder.downsample * given.model.patch_size)
    if patches > getattr(given.model, "pos_embed_max_size", patches):
        values.append(Value("model.pos_embed_max_size", patches, "patches of a side"))
    rate = matmul_rate()

    def sized(width: int) -> tuple[list[Value], TrainConfig, float]:
        """The values at a width, their config, seconds of a step."""
        added = [*values, Value("model.width", width, f"its base width is {given.mup.base_width}")]
        config = load_config(base, [value.override for value in added])
        return added, config, config.train.global_batch_size * image_flops(config) / (SMALL_SHARE * rate)

    hours_s = TRAINING * wish.hours * 3600
    narrow = given.mup.base_width
    values, config, step_s = sized(2 * narrow if hours_s >= SMALL_STEPS * sized(2 * narrow)[2] else narrow)
    if (steps := two_digits(hours_s / step_s)) < 10:
        raise ConfigError(f"{wish.hours:g} hours hold {steps} steps of {base}: expected 10 at least; give more hours")
    values += _lasting(config, steps, wish.hours, step_s)
    page = (
        f"{name} on this machine's processors: {_parameters(base, [value.override for value in values]) / 1e6:.1f} M "
        f"parameters, {config.train.global_batch_size} images a step\nabout {step_s:.2g} s a step: a matrix product "
        f"reaches {rate / 1e9:.0f} GFLOP/s here at present, and a step {SMALL_SHARE:.0%} of it"
    )
    return Proposal(base, _text(base, "small enough for a machine without a GPU", values, page), page)


def matmul_rate() -> float:
    """FLOP/s of a product of fp32 matrices on this machine's processors: the best of several."""
    a, best = torch.ones(1024, 1024), math.inf
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def _lasting(config: TrainConfig, steps: int, hours: float, step_s: float) -> list[Value]:
    """What so many steps ask of a config."""
    values = [Value("train.steps", steps, f"{TRAINING:.0%} of {hours:g} hours at {step_s:.3g} s")]
    if config.optim.warmup_steps > steps // 10:
        values.append(Value("optim.warmup_steps", steps // 10, "a tenth of the steps"))
    for key in ("validate_every", "checkpoint_every", "sample_every"):
        if getattr(config.train, key) > steps:
            values.append(Value(f"train.{key}", max(1, steps // 5), "several times in the run"))
    return values


def values_of(wish: Wish, name: str) -> list[Value]:
    """What the wish says of the config itself. name: of its runs, whatever the base calls its own. Raises ConfigError
    where the encoder's folder tells no width."""
    values = [
        Value("run.name", name, "its folder is run.dir/run.name"),
        Value("data.shards", wish.data, "WebDataset shards: mudit shard makes them, mudit shard check looks at them"),
        Value("data.val_shards", None, "validates on the training shards: better name some that no step trains on"),
        Value("data.resolution", wish.resolution, "pixels of a side; images are cropped to it"),
    ]
    if wish.encoder != SHIPPED:
        values += [
            Value("text_encoder.path", wish.encoder, "frozen; read as it is"),
            Value("text_encoder.subfolder", None, ""),
            Value("text_encoder.width", encoder_width(Path(wish.encoder)), "of its states, from its config.json"),
        ]
    return values


def encoder_width(folder: Path) -> int:
    """Features of a text encoder's states. Raises ConfigError where the folder's config.json does not tell."""
    try:
        told = parse_json((folder / "config.json").read_bytes())
        told = told.get("text_config", told)
        return int(told.get("d_model") or told["hidden_size"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f'{str(folder)!r} is no text encoder: expected "{SHIPPED}", or a folder whose config.json tells d_model or '
            "hidden_size (mudit fetch --to FOLDER brings one)"
        ) from None


def suited(bases: Sequence[str], overrides: Sequence[str], flops: float) -> list[str]:
    """Those whose parameters are at most LARGER times the best for so many FLOPs, the largest first; else the last."""
    best = 0.0009 * flops**0.5681  # as right_size.py has it
    sizes = {base: _parameters(base, overrides) for base in bases}
    return [base for base in bases if sizes[base] <= LARGER * best] or [bases[-1]]


def two_digits(number: float) -> int:
    """Rounded down to two digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return int(number // unit * unit)


def _parameters(base: str, overrides: Sequence[str]) -> int:
    return sum(parameter.numel() for parameter in meta_model(load_config(base, overrides)).parameters())


def _text(base: str, why: str, values: Sequence[Value], page: str) -> str:
    head = (
        "Written by mudit init. Every key and its meaning: docs/config.md, or mudit train --help-config. The model is "
        f"that of {base}, {why}. The estimate:"
    )
    lines = [
        *textwrap.wrap(head, 110, initial_indent="# ", subsequent_indent="# "),
        "#",
        *(f"# {line}".rstrip() for line in page.splitlines()),
        f"extends: {base}.yaml",
    ]
    section = ""
    for value in sorted(values, key=lambda value: value.key.partition(".")[0]):
        name, _, key = value.key.partition(".")
        lines += [f"{name}:"] * (name != section)
        lines.append(f"  {key}: {json.dumps(value.value)}" + (f" # {value.why}" if value.why else ""))
        section = name
    return "\n".join([*lines, ""])
