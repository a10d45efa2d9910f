"""From a study to the target's YAML: the base hyperparameters, where they come from, and what may spoil them."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..build.engine import build_mup_table
from ..config.keys import flatten, plain
from ..config.load import load_config
from ..config.resolve import resolve
from ..config.resume import without_factors_of_1
from ..config.schema import TrainConfig
from ..config.yaml_files import CONFIG_DIR, find_config
from ..errors import ConfigError
from ..files import write_atomically
from ..mup.transfer_rules import TESTED, Rates, Rules, Size, lr_factor, ratio, scaled, untested
from .exponent import FILE, Exponent, read_exponent
from .lr_fit import LR, fit_of
from .report import completed
from .space import Point, as_overrides, at_the_ends, transfers
from .study import Study, Trial

# What transfer needs to be equal: with another value the base hyperparameters mean something else.
_SHARED = ("model.kind", "model.head_dim", "mup.parametrization", "mup.base_width", "mup.wd_rule", "objective.kind",
           "objective.predict", "objective.x_clamp", "objective.uniform_share", "objective.contrastive_weight",
           "optim.kind", "optim.muon.nesterov", "optim.muon.steps", "optim.muon.by_head", "optim.muon.include",
           "optim.muon.exclude")  # fmt: skip
_RATES = tuple(f"optim.{name}" for name in Rates._fields)


@dataclass(frozen=True)
class Choice:
    """What is transferred. trial: its number; None is the best one. value: of optim.lr, the minimum of the fit over all
    trials or the trial's own; None is the fit's where there is one. rules: for another batch and duration; force: also
    outside the range in which they were tested."""

    trial: int | None = None
    value: Literal["fit", "best"] | None = None
    rules: Rules = "none"
    force: bool = False


@dataclass(frozen=True)
class _Found:
    """Values by key with a comment each, and lines for the person who asked."""

    values: Point
    comments: Mapping[str, str]
    said: list[str]


def write_target(study: Study, target: str, output: Path, choice: Choice | None = None) -> list[str]:
    """Write a config that extends `target` and sets what the study found; the lines for the person who asked.

    Raises ConfigError where the target does not share the proxy's parametrization, or refuses the values, or lies
    outside the range of the rules.
    """
    choice = choice or Choice()
    trial = _chosen(study, choice.trial)
    searched = _searched(study, trial, choice)
    proxy, own = study.proxy, load_config(target)
    _check_shared(proxy, own, target)
    ruled = _by_the_rules(study.folder, proxy, own, searched, choice)
    found = load_config(target, as_overrides(ruled.values))
    warned = [f"warning: {line}" for line in at_the_ends(study.search.space, searched.values)]
    warned += [f"warning: {line}" for line in warnings(proxy, found, ruled.values, choice.rules)]
    why = f"the best of {len(completed(study))} finished" if choice.trial is None else "chosen by hand"
    head = [
        "Written by launch/search.py transfer: the target's config with the base hyperparameters of a proxy.",
        f"study: {study.folder}, {study.search.config} with {' '.join(study.search.overrides) or 'no overrides'}",
        f"trial: {trial.number}, val_loss_ema {trial.value:.6g}, {why}",
        f"commit: {trial.attributes.get('commit') or 'unknown'}",
        f"muP table of the proxy: sha256 {trial.attributes.get('table', 'unknown')}",
        f"muP table of the target: sha256 {build_mup_table(found).hash}",
        *searched.said,
        *ruled.said,
        *warned,
    ]
    body = _yaml(_extended(target, output), ruled.values, ruled.comments)
    _write_checked(output, "".join(f"# {line}\n" for line in head) + body, flatten(plain(found)), target)
    written = f"{output}: {target} with {' '.join(as_overrides(ruled.values))}"
    return [*searched.said, *ruled.said, *warned, written]


def _check_shared(proxy: TrainConfig, found: TrainConfig, target: str) -> None:
    """Raise ConfigError unless the base hyperparameters mean the same in both."""
    before, after = flatten(plain(proxy)), flatten(plain(found))
    differ = [
        f"{k}: {before.get(k)} in the proxy, {after.get(k)} in {target}"
        for k in _SHARED
        if before.get(k) != after.get(k)
    ]
    if differ:
        raise ConfigError("base hyperparameters do not carry over between these:\n  " + "\n  ".join(differ))


def _searched(study: Study, trial: Trial, choice: Choice) -> _Found:
    """The trial's values, and for the learning rate the fit's where that is chosen or there is one."""
    point, by_hand = dict(trial.point), choice.trial is not None
    comments = dict.fromkeys(point, f"of trial {trial.number}")
    if by_hand and choice.value == "fit":
        raise ConfigError("--value fit is of all trials, and --trial chooses one: give one of the two")
    fit = fit_of(study.search.space, completed(study))
    if fit is None and choice.value == "fit":
        raise ConfigError(f"--value fit needs a search over {LR}, and {study.folder} has none: use --value best")
    if fit is None or by_hand or choice.value == "best":
        return _Found(point, comments, [])
    own = f"trial {trial.number} had {point[LR]:.4g}"
    if (region := fit.region) is None:
        if choice.value == "fit":
            raise ConfigError(f"--value fit: there is {fit}; use --value best, where {own}")
        return _Found(point, comments, [f"{LR}: of trial {trial.number}, because there is {fit}"])
    point[LR] = float(f"{region.value:.4g}")
    comments[LR] = f"{fit}; {own}"
    return _Found(point, comments, [f"{LR}: {fit}; {own}"])


def best_point(study: Study) -> Point:
    """What is transferred without rules: the best trial's values, with the fit's learning rate where there is one."""
    return _searched(study, _chosen(study, None), Choice()).values


def _by_the_rules(study: Path, proxy: TrainConfig, target: TrainConfig, searched: _Found, choice: Choice) -> _Found:
    """The values at the target's batch and duration: lr, betas, eps and weight decay together. study: its folder, which
    may have the exponent of the learning rate in the duration."""
    if choice.rules == "none":
        if choice.force:
            raise ConfigError("--force-rules has nothing to force under --rules none: name the rules")
        return _Found(searched.values, searched.comments, [])
    if target.optim.kind == "muon":
        raise ConfigError(
            f"--rules {choice.rules} moves AdamW's rates, and no rule is known for Muon's: search at the batch and "
            "duration of the target, and transfer with --rules none"
        )
    here, there, rates = _size(proxy), _size(target), _rates(proxy, searched.values)
    r = ratio(choice.rules, here, there)
    measured = read_exponent(study) if choice.rules == "completed-p" else None
    lr_by = lr_factor(here, there, measured.exponent.value) if measured else None
    try:
        moved = scaled(rates, r, lr_by)
    except ValueError as error:
        raise ConfigError(f"--rules {choice.rules}: {error}") from None
    outside = list(untested(choice.rules, here, there, moved))
    if outside and not choice.force:
        raise ConfigError(
            f"--rules {choice.rules} was not tested there, so nothing is written:\n  " + "\n  ".join(outside) + "\n"
            "Search nearer to the target, or take it as it is: --force-rules"
        )
    forced, end = ("forced, " if outside else ""), f" (r = {r:.4g})"
    origin = {key: searched.comments.get(key, "the proxy's own") for key in _RATES}
    how = {
        "optim.lr": f"{rates.lr:.4g} x sqrt(r); {origin[LR]}",
        "optim.betas": f"1 - beta x r, from {list(rates.betas)}; {origin['optim.betas']}",
        "optim.eps": f"{rates.eps:.4g} / sqrt(r); {origin['optim.eps']}",
        "optim.weight_decay": f"{rates.weight_decay:.4g} x sqrt(r), times lr in AdamW; {origin['optim.weight_decay']}",
    }
    said = [_account(choice.rules, here, there, r)]
    if measured and lr_by:
        law = f"sqrt(batch) x images^{measured.exponent.value:.2f} = {lr_by:.4g}, measured by horizon"
        how[LR] = f"{rates.lr:.4g} x {law}, in place of sqrt(r); {origin[LR]}"
        how["optim.weight_decay"] = (
            f"{rates.weight_decay:.4g} x r / {lr_by:.4g}, so that lr x weight decay moves by r; "
            f"{origin['optim.weight_decay']}"
        )
        said.append(_by_measure(study, measured, here, there, r))
    own = flatten(plain(target))
    for key in _RATES:
        how[key] = f"{forced}{choice.rules}{end}: {how[key]}; in place of the target's {_text(own[key])}"
    values = searched.values | {k: _text(v) if isinstance(v, tuple) else v
                                for k, v in zip(_RATES, moved, strict=True)}  # fmt: skip
    said += [f"forced: {line}" for line in outside]
    return _Found(values, {**searched.comments, **how}, said)


def _by_measure(study: Path, measured: Exponent, proxy: Size, target: Size, r: float) -> str:
    """The measured exponent in a line: where it is from, and what of the rule it takes the place of."""
    found = measured.exponent
    value, *ends = (lr_factor(proxy, target, e) for e in (found.value, found.low, found.high))
    return (
        f"horizon: {measured}, measured at {measured.durations} ({study / FILE}), in place of the rule's -1/2: lr x "
        f"{value:.4g} [{min(ends):.4g}, {max(ends):.4g}], not x {r**0.5:.4g}; weight decay x {r / value:.4g}"
    )


def _account(rules: Rules, proxy: Size, target: Size, r: float) -> str:
    """The rules in a line: what they were given, and where they were found to hold."""
    tested, batch, steps = TESTED[rules], target.batch / proxy.batch, target.steps / proxy.steps
    given = f"{rules}: batch x {batch:.4g}, steps x {steps:.4g}, images x {batch * steps:.4g}, so r = {r:.4g}"
    low, high = tested.batch
    batches = f"tested for batches of {low:.4g} to {high:.4g} times the proxy's"
    if rules == "completed-p":
        return (
            f"{given}; {batches}, widths up to {tested.width:g} and depths up to {tested.depth:g} times, on language "
            "(arXiv 2512.22382)"
        )
    return f"{given}; {batches} and beta2 of at least {tested.least_beta2:g}, at equal images (arXiv 2205.10287)"


def _size(config: TrainConfig) -> Size:
    model, train = config.model, config.train
    return Size(train.global_batch_size, train.steps, model.width, model.depth, config.mup.base_depth or model.depth)


def _rates(proxy: TrainConfig, point: Point) -> Rates:
    """The proxy's at a point of the search."""
    given: dict[str, Any] = {name: point.get(f"optim.{name}", getattr(proxy.optim, name)) for name in Rates._fields}
    betas = given.pop("betas")
    first, second = json.loads(betas) if isinstance(betas, str) else betas  # a list is stored as text
    return Rates(betas=(first, second), **given)


def _text(value: Any) -> str:
    return json.dumps(value)


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


def _yaml(extends: str, point: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """A few scalars by section, each with its comment: `optim:` and its keys."""
    nested: dict[str, Any] = {}
    for key, value in point.items():
        *sections, leaf = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        # Text is a list that the space stores as it is written.
        inner[leaf] = f"{value if isinstance(value, str) else json.dumps(value)} # {comments[key]}"
    return "\n".join([f"extends: {json.dumps(extends)}", *_lines(nested, "")]) + "\n"


def _lines(data: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value}"


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings(proxy: TrainConfig, target: TrainConfig, written: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    """What differs between proxy and target beside the width, and moves the optimum or may. written: the keys that were
    searched or follow from the rules."""
    if proxy.model.width < proxy.mup.base_width:
        yield f"proxy: its width {proxy.model.width} is below the base width {proxy.mup.base_width}; optima drift there"
    here, there = _size(proxy), _size(target)
    by_rules = "--rules completed-p" if proxy.optim.kind == "adamw" else "another search: for Muon no rule is known"
    images, longer = here.steps * here.batch, there.steps * there.batch
    if (rules == "none" and here.steps != there.steps) or (rules == "sqrt-batch" and images != longer):
        yield (
            f"horizon: {here.steps} steps ({images:.3g} images) in the proxy, {there.steps} ({longer:.3g}) in the "
            f"target. The best learning rate falls as runs grow longer, which muP leaves to {by_rules}"
        )
    if here.batch != there.batch and rules == "none":
        yield (
            f"batch: {here.batch} in the proxy, {there.batch} in the target. Learning rate, betas, epsilon and weight "
            f"decay belong to a batch size, which muP leaves to {by_rules}"
        )
    by_depth = here.depth != there.depth and here.base_depth == there.base_depth
    if here.depth != there.depth and not by_depth:
        yield (
            f"depth: {here.depth} in the proxy, {there.depth} in the target. muP transfers across width; search at the "
            "target's depth, or set mup.base_depth in both"
        )
    shifts = [resolve(c, 1).time_shift for c in (proxy, target)]
    if shifts[0] != shifts[1]:
        yield f"time shift: {shifts[0]:.3g} in the proxy, {shifts[1]:.3g} in the target: other noise levels are trained"
    yield from _other_keys(proxy, target, (*written, *(("mup.base_depth",) if by_depth else ())))


def _other_keys(proxy: TrainConfig, target: TrainConfig, known: Collection[str]) -> Iterator[str]:
    """Keys that differ, matter, and are not dealt with elsewhere."""
    before, after = (without_factors_of_1(flatten(plain(config))) for config in (proxy, target))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key in known or key in _HANDLED:
            continue
        if key.startswith(_DATA):
            yield f"{key}: {before.get(key)} in the proxy, {after.get(key)} in the target: the data differ"
        elif key.startswith(("model.", "mup.", "objective.", "ema.")) or transfers(key) or key in _SCHEDULE:
            yield f"{key}: {before.get(key)} in the proxy, {after.get(key)} in the target, and it was not searched"


_HANDLED = ("model.width", "model.depth", "objective.shift_base_tokens", "data.num_workers", "data.max_bad_share",
            "data.max_image_pixels")  # fmt: skip
_DATA = ("data.", "text_encoder.", "autoencoder.")
_SCHEDULE = ("optim.schedule", "optim.decay_steps", "optim.decay", "optim.spike_threshold")
