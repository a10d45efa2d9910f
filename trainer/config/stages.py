"""The stages of a run: from which step on which keys of the config change (docs/stages.md).

Each stage is trained as a run of its own config that resumes the last checkpoint of the stage before, so that nothing
of a stage lives in the loop. Weights, moments, EMA and step go on; what follows from the config (buckets, time shift,
micro-batch, validation bank, sample grids) is built anew.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from pydantic import ValidationError

from models.model_config import ModelConfig
from models.registry import MODEL_KINDS

from .conflicts import conflicts
from .keys import declaration, flatten, key_class, leaf_keys, may_be_staged, plain
from .messages import explain
from .schema import StageConfig, TrainConfig
from .yaml_files import lay, nearest

# Free to change when a run is resumed, but not from stage to stage: they belong to the run, or to its processes.
_OF_THE_RUN = ("train.steps", "train.deterministic", "parallel.engine", "parallel.zero_stage", "parallel.shard")
_WHICH_SAMPLES = ("shards", "sources", "captions", "filter", "caption_fields", "caption_key")
_OWN_SCHEDULE = ("schedule", "warmup_steps", "decay_steps")


class Stage(NamedTuple):
    """A stage of a run; a run without stages is one stage."""

    number: int
    """From 0."""
    of: int
    """How many stages the run has."""
    first_step: int
    last_step: int
    """The step after its last update, which is the next stage's first."""
    config: TrainConfig
    """What it is trained with; a stage has no stages."""
    images_before: int
    """Samples of all stages before it."""
    schedule: tuple[int, int]
    """The first step of the learning-rate schedule that it is in, and the step at which that ends."""
    other_data: bool = False
    """Whether it gives keys of `data` that say which samples there are, or in which shares."""

    @property
    def name(self) -> str:
        return f"stage {self.number + 1} of {self.of}"

    @property
    def aligned(self) -> bool:
        """Whether any of its updates has REPA's alignment."""
        o = self.config.objective
        return o.repa_weight > 0 and (o.repa_until is None or o.repa_until > self.first_step)

    def alone(self) -> TrainConfig:
        """A run of its own that computes what the stage does, for what follows from that: price and memory."""
        o, train = self.config.objective, self.config.train
        train = train.model_copy(update={"steps": self.last_step - self.first_step})
        if not self.aligned:
            o = o.model_copy(update={"repa_weight": 0.0, "repa_until": None})
        elif o.repa_until is not None:
            o = o.model_copy(update={"repa_until": o.repa_until - self.first_step})
        return self.config.model_copy(update={"train": train, "objective": o})

    def begins_with_other_data(self, step: int) -> bool:
        """Whether the stage begins at this step, with other data than the stage before."""
        return self.other_data and step == self.first_step

    def images(self, step: int) -> int:
        """Samples that the run has seen before update `step` of this stage."""
        return self.images_before + (step - self.first_step) * self.config.train.global_batch_size


def stages_of(config: TrainConfig) -> list[Stage]:
    """The stages of a config that has no problems."""
    if not config.stages:
        return [Stage(0, 1, 0, config.train.steps, config, 0, (0, config.train.steps))]
    given, ends, stages = plain(config), [*_borders(config.stages), config.train.steps], list[Stage]()
    owners = [number for number, stage in enumerate(config.stages) if not number or _owns_schedule(stage)]
    firsts = [([0, *ends])[number] for number in owners]
    for number in range(len(config.stages)):
        before = stages[-1] if stages else None
        first = before.last_step if before else 0
        stages.append(
            Stage(
                number,
                len(config.stages),
                first,
                ends[number],
                TrainConfig.model_validate(as_trained(given, ends[number])),
                before.images(first) if before else 0,
                next((a, b) for a, b in pairwise([*firsts, config.train.steps]) if a <= first < b),
                any(key in config.stages[number].data for key in _WHICH_SAMPLES),
            )
        )
    return stages


def stage_at(config: TrainConfig, step: int) -> Stage:
    """The stage that does update `step` (from 0); after the last update, the last one."""
    stages = stages_of(config)
    return next((stage for stage in stages if step < stage.last_step), stages[-1])


def images_of(config: TrainConfig) -> int:
    """Samples of the whole run."""
    last = stages_of(config)[-1]
    return last.images(last.last_step)


def as_trained(config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Plain data of a config -> those of the stage that did the last update before `step`, without stages."""
    stages = _entries(config)
    found = {key: value for key, value in config.items() if key != "stages"}
    weight, ended = _repa_weight(found), 0
    for first, stage in zip([0, *(stage["until"] for stage in stages[:-1])], stages, strict=False):
        if first == 0 or first < step:
            before = _repa_weight(found)
            found = lay(found, {section: keys for section, keys in stage.items() if section != "until" and keys})
            weight = _repa_weight(found) or weight
            ended = first if before and not _repa_weight(found) else ended
    if ended and not _repa_weight(found):  # the projector stays, for checkpoints to have it
        return lay(found, {"objective": {"repa_weight": weight, "repa_until": ended}})
    return found


def _repa_weight(config: Mapping[str, Any]) -> float:
    return config.get("objective", {}).get("repa_weight", 0)


def borders_before(config: Mapping[str, Any], step: int) -> list[int]:
    """Steps before `step` at which the stages of a config, as plain data, end."""
    return [stage["until"] for stage in _entries(config)[:-1] if stage["until"] < step]


def trained_stages(config: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """The entries of `stages` that did updates before `step`, the first one anyway, each a copy."""
    return [dict(stage) for stage in (_entries(config) or [{}])[: len(borders_before(config, step)) + 1]]


def _entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(config.get("stages") or [])


def stage_problems(config: TrainConfig) -> Iterator[str]:
    """A sentence for everything that is wrong with the stages of a config that is right without them."""
    stages = config.stages
    if not stages:
        return
    if config.parallel.engine == "zero":
        yield "stages need parallel.engine fsdp2: zero resumes in new processes alone"
    if config.data.epochs is not None:
        yield f"data.epochs {config.data.epochs} does not go with stages, each of which counts its own: leave it null"
    text = config.text_encoder
    if (text.more or text.pad) and any("max_length" in stage.text_encoder for stage in stages):
        yield "stages give text_encoder.max_length, which stays where text_encoder.more or pad is set"
    if given := list(_keys(stages[0])):
        yield f"stages[0] gives {', '.join(given)}: the first stage is trained with the keys outside of stages"
    wrong = [*_wrong_borders(config), *(p for number in range(len(stages)) for p in _wrong_keys(config, number))]
    yield from wrong
    if not wrong and not given:
        for number in range(1, len(stages)):
            yield from (f"stages[{number}]: {problem}" for problem in _problems_of(config, number))


def _borders(stages: tuple[StageConfig, ...]) -> list[int]:
    return [stage.until for stage in stages[:-1] if stage.until is not None]


def _owns_schedule(stage: StageConfig) -> bool:
    return any(key in stage.optim for key in _OWN_SCHEDULE)


def _keys(stage: StageConfig) -> list[str]:
    """The dotted keys that a stage gives."""
    return list(flatten({section: keys for section, keys in dict(stage).items() if section != "until"}))


def _wrong_borders(config: TrainConfig) -> Iterator[str]:
    stages, steps = config.stages, config.train.steps
    for number, stage in enumerate(stages[:-1]):
        if stage.until is None:
            yield f"stages[{number}].until must be given: only the last stage goes on to train.steps"
    borders = [0, *_borders(stages), steps]
    if not all(a < b for a, b in pairwise(borders)):
        yield f"stages[].until must rise, and be less than train.steps {steps}, got {borders[1:-1]}"
    if stages[-1].until not in (None, steps):
        yield f"stages[{len(stages) - 1}].until {stages[-1].until}: the last stage ends at train.steps {steps}"


def _wrong_keys(config: TrainConfig, number: int) -> Iterator[str]:
    """What a stage gives that is no key, or none that may change in mid-run."""
    model = type(config.model)
    known = list(leaf_keys(TrainConfig, model))
    for key in _keys(config.stages[number]):
        if declaration(TrainConfig, key.split("."), model) is None:
            yield f"stages[{number}].{key}: unknown key{nearest(key, known)}"
        elif not may_change(key, model):
            yield f"stages[{number}].{key} may not change in mid-run: it is what the run is, or of its processes"


def may_change(key: str, model: type[ModelConfig]) -> bool:
    """Whether a stage may give a key. model: of the config."""
    path = key.split(".")
    fields = [declaration(TrainConfig, path[: end + 1], model) for end in range(len(path))]
    staged = any(field is not None and may_be_staged(field) for field in fields)
    return key not in _OF_THE_RUN and (staged or key_class(key) != "identity")


def _problems_of(config: TrainConfig, number: int) -> Iterator[str]:
    """What is wrong with the config of a stage."""
    data = as_trained(plain(config), [*_borders(config.stages), config.train.steps][number])
    try:
        TrainConfig.model_validate(data)
    except ValidationError as error:
        yield from (sentence for _, sentence in explain(error, TrainConfig, MODEL_KINDS[config.model.kind]))
        return
    stage = stages_of(config)[number]
    first, last = stage.schedule
    train = stage.config.train.model_copy(update={"steps": last - first})  # over which its schedule runs
    yield from conflicts(stage.config.model_copy(update={"train": train}))
    if stage.config.objective.repa_weight and not config.objective.repa_weight:
        yield "objective.repa_weight cannot rise from 0 in mid-run: the projector is trained from the first step on"


def changes(stage: Stage, before: Stage) -> list[str]:
    """What a stage changes, as text."""
    now, then = flatten(plain(stage.config)), flatten(plain(before.config))
    return [f"{key}: {then.get(key)} -> {now[key]}" for key in now if now[key] != then.get(key)]
