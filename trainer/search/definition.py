"""The YAML of a search: which proxy, which space, how many trials. Read once; the study keeps a copy."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.redaction import quote

from ..build.engine import build_mup_table
from ..config.keys import flatten, plain
from ..config.load import load_config
from ..config.schema import NAME_FORM, TrainConfig, is_name
from ..config.yaml_files import find_config, nearest, override, read
from ..errors import ConfigError
from .space import SAMPLERS, Dimension, Point, Sampler, as_overrides, check_grid, grid_size, parse_space, refusal
from .trust_region import parse_start


@dataclass(frozen=True)
class Published:
    """Sizes as a paper rounds them, for a second line of the cost account."""

    proxy_parameters: float
    """Parameters of the proxy."""
    target_parameters: float
    """Parameters of the target."""
    note: str = ""
    """What the paper's account leaves out."""


@dataclass(frozen=True)
class Search:
    """The keys of a search file (configs/search)."""

    name: str
    """Name of the study's folder below run.dir; the search file's name unless given."""
    config: str
    """Config of the proxy."""
    overrides: tuple[str, ...]
    """Overrides of the proxy's config."""
    space: tuple[Dimension, ...]
    """Base hyperparameters that are searched, each with its range or choices."""
    trials: int
    """Number of points that are tried."""
    sampler: Sampler = "random"
    """How points are chosen: at random, on a grid, from a Sobol sequence (qmc), by tree-structured Parzen estimators
    (tpe), or at random in a box about the best one (trust_region)."""
    start: Point | None = None
    """The first point of trust_region, as {key: value}; keys that are not given have the proxy's own value."""
    seed: int = 0
    """Seed by which points are chosen."""
    seeds: int = 1
    """Runs per point; the k-th run has the same train.seed in every trial."""
    halving: Mapping[str, int] | None = None
    """Asynchronous successive halving: {first_step: step of the first comparison, factor: at each comparison one trial
    in this many goes on}."""
    target: str | None = None
    """Config of the target, with which the cost of the search is compared."""
    published: Published | None = None
    """Sizes that a paper gives for the same search."""

    def proxy(self, point: Point | None = None, more: Sequence[str] = ()) -> TrainConfig:
        """The proxy's config at a point of the space."""
        return load_config(self.config, [*self.overrides, *as_overrides(point or {}), *more])

    @property
    def folder(self) -> Path:
        return Path(self.proxy().run.dir) / self.name

    def run_name(self, number: int, seed: int) -> str:
        """Run folder of a trial; further seeds of the same point lie beside it."""
        return f"{number:04d}" + (f"_seed{seed}" if seed else "")

    def run_config(self, folder: Path, number: int, seed: int, point: Point) -> TrainConfig:
        """A trial's config. The k-th seed is the same in all trials: they see equal data, noise and initial weights."""
        base = self.proxy().train.seed
        where = (f"run.dir={folder}", f"run.name='{self.run_name(number, seed)}'", f"train.seed={base + seed}")
        return self.proxy(point, where)


_KEYS = tuple(field.name for field in dataclasses.fields(Search))


def load_search(name: str, overrides: Sequence[str] = ()) -> Search:
    """Read a search by path or name. Overrides with a dot in their key are the proxy's (train.steps=100), others the
    search's own (trials=4). Raises ConfigError with all problems at once."""
    path = find_config(name)
    data = read(path)
    own = [text for text in overrides if "." not in text.partition("=")[0]]
    for text in own:
        data = override(data, text)
    for_proxy = tuple(text for text in overrides if text not in own)
    return parse_search(data, path.name, path.stem, for_proxy)


def parse_search(data: Mapping[str, Any], source: str, name: str, overrides: Sequence[str] = ()) -> Search:
    """Plain data -> Search, checked against the proxy's config; ConfigError names every problem."""
    problems = [f"{key}: unknown key{nearest(str(key), _KEYS)}" for key in data if key not in _KEYS]
    values = {"name": name, **{key: data[key] for key in _KEYS if data.get(key) is not None}}
    problems += [f"{key} is missing" for key in ("config", "space") if key not in values]
    problems += [
        f"{key} must be {what}, got {quote(values[key])}"
        for key, (what, fits) in _CHECKS.items()
        if key in values and not fits(values[key])
    ]
    if problems:
        raise ConfigError(f"{source}:\n  " + "\n  ".join(problems))
    if "published" in values:
        values["published"] = Published(**values["published"])
    values["overrides"] = (*values.get("overrides", ()), *overrides)
    proxy = load_config(values["config"], values["overrides"])
    if proxy.stages:
        raise ConfigError(f"{source}: {values['config']} has stages, and a trial is of one: add stages=[] to overrides")
    known = flatten(plain(proxy))
    integers = [k for k, v in known.items() if isinstance(v, int) and not isinstance(v, bool)]
    space, problems = parse_space(values["space"], integers)
    # A key that no config has is left to the config's own check, which names the nearest one.
    problems += [line for d in space if d.key in known and (line := refusal(d.key))]
    if problems:
        raise ConfigError(f"{source}:\n  " + "\n  ".join(problems))
    if values.get("sampler") == "grid":
        check_grid(space)
        size = grid_size(space)
        if values.setdefault("trials", size) > size:
            raise ConfigError(f"{source}: trials {values['trials']} is more than the {size} points of the grid")
    if values.get("sampler") == "trust_region":
        values["start"], problems = parse_start(values.get("start", {}), space, known)
        if problems:
            raise ConfigError(f"{source}:\n  " + "\n  ".join(problems))
    elif "start" in values:
        raise ConfigError(f"{source}: start belongs to sampler trust_region: set that, or leave start out")
    if "trials" not in values:
        raise ConfigError(f"{source}: trials is missing: how many points to try")
    search = Search(**{**values, "space": space})
    _check_corners(search, source)
    _check_halving(search, source)
    return search


def _whole(least: int) -> tuple[str, Any]:
    what = "a whole number of at least"
    return f"{what} {least}", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _fits_published(value: Any) -> bool:
    keys = {field.name for field in dataclasses.fields(Published)}
    return isinstance(value, Mapping) and {"proxy_parameters", "target_parameters"} <= value.keys() <= keys


_CHECKS: dict[str, tuple[str, Any]] = {
    "name": (f"a folder's name of {NAME_FORM}", lambda v: isinstance(v, str) and is_name(v)),
    "config": ("the name of a config", lambda v: isinstance(v, str)),
    "target": ("the name of a config", lambda v: isinstance(v, str)),
    "overrides": (
        "a list of section.key=value",
        lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v),
    ),
    "trials": _whole(1),
    "seed": _whole(0),
    "seeds": _whole(1),
    "sampler": (f"one of {', '.join(SAMPLERS)}", lambda v: v in SAMPLERS),
    "start": ("{key: value}, of keys of the space", lambda v: isinstance(v, Mapping)),
    "halving": (
        "{first_step: N, factor: at least 2}",
        lambda v: (
            isinstance(v, Mapping)
            and v.keys() == {"first_step", "factor"}
            and all(isinstance(n, int) for n in v.values())
            and v["first_step"] >= 1
            and v["factor"] >= 2
        ),
    ),
    "published": ("{proxy_parameters, target_parameters, note}", _fits_published),
}


def _check_corners(search: Search, source: str) -> None:
    """The ends of every range, and the start, as overrides: the config's own checks find keys and values that it does
    not have."""
    length = max(len(d.ends) for d in search.space)
    corners = [{d.key: d.ends[min(index, len(d.ends) - 1)] for d in search.space} for index in range(length)]
    for corner in [*([search.start] if search.start else []), *corners]:
        try:
            config = search.proxy(corner)
            if corner in (search.start, corners[0], corners[-1]):
                build_mup_table(config)  # finds names of parameters, which mup.factors and optim.muon have
        except ConfigError as error:
            raise ConfigError(f"{source}: space with {', '.join(as_overrides(corner))}: {error}") from None
        if not config.train.validate_every:
            raise ConfigError(f"{source}: trials are ranked by val_loss_ema: the proxy needs train.validate_every")


def _check_halving(search: Search, source: str) -> None:
    if search.halving is None:
        return
    proxy = search.proxy()
    warmup = max([proxy.optim.warmup_steps, *(int(d.ends[-1] or 0) for d in search.space if "warmup" in d.key)])
    stable = proxy.train.steps - proxy.optim.decay_steps
    first = search.halving["first_step"]
    if proxy.optim.schedule not in ("constant", "wsd"):
        raise ConfigError(
            f"{source}: halving compares runs in their middle, where optim.schedule {proxy.optim.schedule} has another "
            "learning rate than a shorter run would have: use constant or wsd"
        )
    if not warmup < first < stable:
        raise ConfigError(
            f"{source}: halving.first_step {first} must lie after the warm-up ({warmup}) and before {stable}"
        )
    if search.seeds > 1:
        raise ConfigError(f"{source}: halving needs seeds 1, got {search.seeds}")
