"""From a study to the target's YAML: the base hyperparameters, where they come from, and what may spoil them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..build.engine import build_mup_table
from ..config.keys import flatten, plain
from ..config.load import load_config
from ..config.resolve import resolve
from ..config.schema import TrainConfig
from ..config.yaml_files import CONFIG_DIR, find_config
from ..errors import ConfigError
from ..files import write_atomically
from .report import completed
from .space import as_overrides, at_the_ends, transfers
from .study import Study, Trial

HORIZON_EXPONENT = -0.32  # reported for language models, arXiv 2409.19913
LARGEST_BATCH_RATIO = 8.0
LEAST_BETA2 = 0.9

# What transfer needs to be equal: with another value the base hyperparameters mean something else.
_SHARED = ("model.kind", "model.head_dim", "mup.parametrization", "mup.base_width", "mup.wd_rule", "objective.kind")


def write_target(study: Study, target: str, output: Path, number: int | None = None) -> list[str]:
    """Write a config that extends `target` and sets what the study found; the lines for the person who asked.

    Raises ConfigError where the target does not share the proxy's parametrization, or refuses the values.
    """
    trial = _chosen(study, number)
    found = load_config(target, as_overrides(trial.point))
    proxy = study.proxy
    before, after = flatten(plain(proxy)), flatten(plain(found))
    differ = [
        f"{k}: {before.get(k)} in the proxy, {after.get(k)} in {target}"
        for k in _SHARED
        if before.get(k) != after.get(k)
    ]
    if differ:
        raise ConfigError("base hyperparameters do not carry over between these:\n  " + "\n  ".join(differ))
    warned = [f"warning: {line}" for line in at_the_ends(study.search.space, trial.point)]
    warned += [f"warning: {line}" for line in warnings(proxy, found, trial.point)]
    suggested = [f"suggestion, not applied: {line}" for line in suggestions(proxy, found)]
    why = f"the best of {len(completed(study))} finished" if number is None else "chosen by hand"
    head = [
        "Written by launch/search.py transfer: the target's config with the base hyperparameters of a proxy.",
        f"study: {study.folder}, {study.search.config} with {' '.join(study.search.overrides) or 'no overrides'}",
        f"trial: {trial.number}, val_loss_ema {trial.value:.6g}, {why}",
        f"commit: {trial.attributes.get('commit') or 'unknown'}",
        f"muP table of the proxy: sha256 {trial.attributes.get('table', 'unknown')}",
        f"muP table of the target: sha256 {build_mup_table(found).hash}",
        *warned,
        *suggested,
    ]
    text = "".join(f"# {line}\n" for line in head) + _yaml(_extended(target, output), trial.point)
    _write_checked(output, text, after, target)
    return [*warned, *suggested, f"{output}: {target} with {' '.join(as_overrides(trial.point))}"]


def _write_checked(output: Path, text: str, wanted: Mapping[str, Any], target: str) -> None:
    """Write the config, and read it back. Where it is not what was wanted, what was there before stays."""
    if output.resolve() == find_config(target).resolve():
        raise ConfigError(f"--output {output} is the target, which the new config extends: give another file")
    before = output.read_bytes() if output.is_file() else None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, text)
    try:
        if flatten(plain(load_config(str(output)))) | {"run.name": None} != {**wanted, "run.name": None}:
            raise ConfigError(
                f"{output} does not read back as {target} with the study's values: is {target} found from there?"
            )
    except ConfigError:
        if before is None:
            output.unlink()
        else:
            write_atomically(output, before)
        raise


def _chosen(study: Study, number: int | None) -> Trial:
    done = completed(study)
    if number is None:
        return done[0]
    chosen = [trial for trial in done if trial.number == number]
    if not chosen:
        raise ConfigError(f"trial {number} is none of the finished ones: {', '.join(str(t.number) for t in done[:20])}")
    return chosen[0]


def _extended(target: str, output: Path) -> str:
    """How the written file names the target: as under configs/, else by its full path."""
    path = find_config(target).resolve()
    return str(path.relative_to(CONFIG_DIR)) if path.is_relative_to(CONFIG_DIR) else str(path)


def _yaml(extends: str, point: Mapping[str, Any]) -> str:
    """A few scalars by section: `optim:` and its keys."""
    nested: dict[str, Any] = {}
    for key, value in point.items():
        *sections, leaf = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return "\n".join([f"extends: {json.dumps(extends)}", *_lines(nested, "")]) + "\n"


def _lines(data: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:  # text is a list that the space stores as it is written
            yield f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}"


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings(proxy: TrainConfig, target: TrainConfig, searched: Mapping[str, Any]) -> Iterator[str]:
    """What differs between proxy and target beside the width, and moves the optimum or may."""
    if proxy.model.width < proxy.mup.base_width:
        yield f"proxy: its width {proxy.model.width} is below the base width {proxy.mup.base_width}; optima drift there"
    images, wanted = (c.train.steps * c.train.global_batch_size for c in (proxy, target))
    if target.train.steps != proxy.train.steps:
        yield (
            f"horizon: {proxy.train.steps} steps ({images:.3g} images) in the proxy, {target.train.steps} "
            f"({wanted:.3g}) in the target. The best learning rate falls as runs grow longer, which muP does not cover"
        )
    if target.train.global_batch_size != proxy.train.global_batch_size:
        yield (
            f"batch: {proxy.train.global_batch_size} in the proxy, {target.train.global_batch_size} in the target. "
            "Learning rate and betas belong to a batch size"
        )
    if target.model.depth != proxy.model.depth and target.mup.base_depth is None:
        yield (
            f"depth: {proxy.model.depth} in the proxy, {target.model.depth} in the target. muP transfers across width; "
            "search at the target's depth, or set mup.base_depth in both"
        )
    shifts = [resolve(c, 1).time_shift for c in (proxy, target)]
    if shifts[0] != shifts[1]:
        yield f"time shift: {shifts[0]:.3g} in the proxy, {shifts[1]:.3g} in the target: other noise levels are trained"
    before, after = flatten(plain(proxy)), flatten(plain(target))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key in searched or key in _HANDLED:
            continue
        if key.startswith(_DATA):
            yield f"{key}: {before.get(key)} in the proxy, {after.get(key)} in the target: the data differ"
        elif key.startswith(("model.", "mup.", "objective.", "ema.")) or transfers(key) or key in _SCHEDULE:
            yield f"{key}: {before.get(key)} in the proxy, {after.get(key)} in the target, and it was not searched"


_HANDLED = ("model.width", "model.depth", "objective.shift_base_tokens", "data.num_workers", "data.max_bad_share",
            "data.max_image_pixels")  # fmt: skip
_DATA = ("data.", "text_encoder.", "autoencoder.")
_SCHEDULE = ("optim.schedule", "optim.decay_steps", "optim.decay", "optim.spike_threshold")


def suggestions(proxy: TrainConfig, target: TrainConfig) -> Iterator[str]:
    """Rules for another batch, horizon and decay, worked out; `target` has the study's values. Nothing is applied."""
    optim, ratio = target.optim, target.train.global_batch_size / proxy.train.global_batch_size
    if ratio != 1:
        betas = [1 - ratio * (1 - beta) for beta in optim.betas]
        if (
            1 / LARGEST_BATCH_RATIO <= ratio <= LARGEST_BATCH_RATIO
            and betas[1] > LEAST_BETA2 - 1e-9
            and min(betas) >= 0
        ):
            yield (
                f"Adam's square-root rule for {ratio:g} x the batch at as many images (arXiv 2205.10287): optim.lr="
                f"{optim.lr * ratio**0.5:.4g} optim.betas=[{betas[0]:.4g}, {betas[1]:.4g}] "
                f"optim.eps={optim.eps / ratio**0.5:.3g}"
            )
        else:
            yield (
                f"none for {ratio:g} x the batch: the square-root rule holds up to {LARGEST_BATCH_RATIO:g} x and beta2 "
                f"of at least {LEAST_BETA2}; search at the target's batch"
            )
    images = [c.train.steps * c.train.global_batch_size for c in (proxy, target)]
    if images[0] != images[1]:
        longer = images[1] / images[0]
        yield (
            f"{longer:.3g} x the images: optim.lr={optim.lr * longer**HORIZON_EXPONENT:.4g} with the exponent "
            f"{HORIZON_EXPONENT} of language models (arXiv 2409.19913); nobody has measured it for diffusion. Better: "
            "two searches at different train.steps"
        )
    if optim.weight_decay and target.train.steps != proxy.train.steps:
        decay = optim.weight_decay * proxy.train.steps / target.train.steps
        yield (
            f"the weights forget over 1 / (lr x decay) = {1 / (optim.lr * optim.weight_decay):.3g} steps; for the same "
            f"share of the run as in the proxy (arXiv 2405.13698): optim.weight_decay={decay:.4g}"
        )
