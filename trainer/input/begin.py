"""Where the data of a stage begin, from the stages before it and what rollbacks have skipped."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from data.config import DataConfig
from data.index import ImageTextIndex
from data.stages import Begin, Part

from ..config.resolve import buckets_of
from ..config.schema import TrainConfig
from ..config.stages import stages_of


class BeginData(NamedTuple):
    """Where the data of a stage begin. step: of the data, that reads their first samples. position: of the first of
    these. number: of the stage. before: the stages before it since the data were new, each with its first step of the
    data."""

    step: int
    position: int
    number: int = 0
    before: Sequence[tuple[int, TrainConfig]] = ()

    def of_index(
        self, config: TrainConfig, index: ImageTextIndex, open_with: Callable[[DataConfig], ImageTextIndex]
    ) -> Begin:
        """The same with the indexes of the data. index: of the stage's own. open_with: opens that of a stage which read
        the same samples in other shares. A stage that read other samples leaves nothing over."""
        before: list[tuple[int, Part]] = []
        for step, earlier in self.before:
            if _samples(earlier.data) == _samples(config.data):
                same = earlier.data.all_sources() == config.data.all_sources()
                before.append((step, part_of(earlier, index if same else open_with(earlier.data))))
            else:
                before.clear()
        return Begin(self.step, self.position, self.number, before)


def begin_of(config: TrainConfig, number: int, skipped_before: Callable[[int], int] = lambda step: 0) -> BeginData:
    """Where the data of stage `number` begin. config: of the run, with its stages. skipped_before: step -> steps of the
    data that rollbacks have skipped before it."""
    new_data = config.data.first_step
    step, position, batch, before = 0, 0, 0, list[tuple[int, TrainConfig]]()
    for stage in stages_of(config)[: number + 1]:
        first = stage.first_step + skipped_before(stage.first_step)
        position += (first - step) * batch
        step, batch = first, stage.config.train.global_batch_size
        if stage.first_step < new_data < stage.last_step:  # the order begins anew within this stage
            position += (new_data - step) * batch
            step = new_data
        if stage.first_step <= new_data < stage.last_step:
            before.clear()
        before.append((step, stage.config))
    return BeginData(step, position, number, before[:-1])


def part_of(config: TrainConfig, index: ImageTextIndex) -> Part:
    data = config.data
    return Part(index, buckets_of(config), config.train.global_batch_size, data.characters_per_token)


def _samples(data: DataConfig) -> tuple[object, ...]:
    """What decides which samples a set of data has."""
    sources = [replace(source, weight=1.0) for source in data.all_sources()]
    return sources, data.filter, data.captions, data.caption_fields, data.caption_key
