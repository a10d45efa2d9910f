"""Stages: what each is trained with, what may change, and what a resume compares."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trainer.build.flops import image_flops, training_flops
from trainer.config.keys import plain
from trainer.config.load import load_config, parse_trained
from trainer.config.resume import check_resume
from trainer.config.schema import TrainConfig
from trainer.config.stages import as_trained, images_of, stage_at, stages_of
from trainer.errors import ConfigError
from trainer.forecast.rungs import Rungs
from trainer.input.begin import begin_of
from trainer.recovery.skipped_ranges import SkippedRange, skipped_before

THREE = (
    "train.steps=100",
    "stages=[{until: 40}, {until: 70, data: {resolution: 16}, train: {global_batch_size: 4}, optim: {lr: 0.5}},"
    " {data: {flip: 0.25}, optim: {schedule: wsd, decay_steps: 10}}]",
)


def config(*overrides: str) -> TrainConfig:
    return load_config("mmdit_debug_mup.yaml", overrides)


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        config("train.steps=100", *overrides)
    return str(error.value)


def test_each_stage_keeps_what_those_before_it_have_changed() -> None:
    stages = stages_of(config(*THREE))
    assert [(s.first_step, s.last_step, s.images_before) for s in stages] == [(0, 40, 0), (40, 70, 320), (70, 100, 440)]
    assert [s.config.data.resolution for s in stages] == [32, 16, 16]
    assert [s.config.data.flip for s in stages][1:] == [stages[0].config.data.flip, 0.25]
    assert [s.config.optim.lr for s in stages][1:] == [0.5, 0.5]
    assert [s.schedule for s in stages] == [(0, 70), (0, 70), (70, 100)]
    assert all(not s.config.stages for s in stages)
    assert images_of(config(*THREE)) == 440 + 30 * 4
    assert [stage_at(config(*THREE), step).number for step in (0, 39, 40, 69, 70, 99, 100)] == [0, 0, 1, 1, 2, 2, 2]


def test_a_run_without_stages_is_one_stage_of_the_config_itself() -> None:
    c = config("train.steps=100")
    (stage,) = stages_of(c)
    assert stage.config is c
    assert (stage.first_step, stage.last_step, stage.schedule, images_of(c)) == (0, 100, (0, 100), 800)


def test_flops_are_those_of_the_stages() -> None:
    stages = stages_of(config(*THREE))
    each = [image_flops(stage.config) for stage in stages]
    assert each[1] < each[0]
    assert training_flops(config(*THREE)) == 320 * each[0] + 240 * each[1]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ("[{until: 40, data: {flip: 0}}, {data: {flip: 1}}]", "stages[0] gives data.flip: the first stage is trained"),
        ("[{data: {}}, {data: {flip: 1}}]", "stages[0].until must be given"),
        ("[{until: 40}, {until: 30}, {}]", "stages[].until must rise, and be less than train.steps 100, got [40, 30]"),
        ("[{until: 100}, {}]", "stages[].until must rise"),
        ("[{until: 40}, {until: 90}]", "stages[1].until 90: the last stage ends at train.steps 100"),
        ("[{until: 40}, {data: {resolutoin: 16}}]", 'did you mean "data.resolution"?'),
        ("[{until: 40}, {autoencoder: {channels: 4}}]", "stages.1.autoencoder: unknown key"),
        ("[{until: 40}, {text_encoder: {width: 3}}]", "stages[1].text_encoder.width may not change in mid-run"),
        ("[{until: 40}, {parallel: {shard: 1}}]", "stages[1].parallel.shard may not change in mid-run"),
        ("[{until: 40}, {optim: {muon: {by_head: true}}}]", "stages[1].optim.muon.by_head may not change in mid-run"),
        ("[{until: 40}, {data: {filter: {min_side: 4, min_sid: 3}}}]", "stages[1].data.filter.min_sid: unknown key"),
        ("[{until: 40}, {ema: {decays: [0.9]}}]", "stages.1.ema: unknown key"),
        ("[{until: 40}, {train: {steps: 9}}]", "stages[1].train.steps may not change in mid-run"),
        ("[{until: 40}, {model: {depth: 3}}]", "stages[1].model.depth may not change in mid-run"),
        ("[{until: 40}, {data: {resolution: 33}}]", "stages[1]: data.resolution 33 is not a multiple of 4"),
        ("[{until: 40}, {data: {resolution: x}}]", "stages[1]: data.resolution: Input should be a valid integer"),
        ("[{until: 40}, {optim: {warmup_steps: 60}}]", "warmup_steps 60 must be less than train.steps 60"),
        ("[{until: 40}, {objective: {repa_weight: 1}}]", "objective.repa_weight cannot rise from 0 in mid-run"),
    ],
)
def test_what_is_wrong_is_told_before_training(stages: str, told: str) -> None:
    assert told in problems(f"stages={stages}")


def test_what_does_not_go_with_stages() -> None:
    assert "stages need parallel.engine fsdp2" in problems(*THREE[1:], "parallel.engine=zero")
    assert "data.epochs 2 does not go with stages" in problems(*THREE[1:], "data.epochs=2")
    assert "password" in problems("stages=[{until: 40}, {data: {shards: 's3://me:secret@host/a.tar'}}]")


def test_repa_ends_with_a_stage_and_keeps_its_projector() -> None:
    c = config("train.steps=100", "objective.repa_weight=0.5", "objective.repa_layer=1",
               "stages=[{until: 40}, {objective: {repa_weight: 0}}]")  # fmt: skip
    first, second = (stage.config for stage in stages_of(c))
    assert first.objective.repa_until is None
    assert (second.objective.repa_weight, second.objective.repa_until) == (0.5, 40)
    assert second.projector == first.projector is not None
    stages = stages_of(c)
    assert [stage.aligned for stage in stages] == [True, False]
    assert stages[1].alone().projector is None
    assert training_flops(c) == 320 * image_flops(first) + 480 * image_flops(second, aligned=False)
    again = "stages=[{until: 40}, {until: 60, objective: {repa_weight: 0}}, {objective: {repa_weight: 0.25}}]"
    c = config("train.steps=100", "objective.repa_weight=0.5", "objective.repa_layer=1", again)
    on_again = stages_of(c)[2]
    assert on_again.aligned
    assert (on_again.config.objective.repa_weight, on_again.config.objective.repa_until) == (0.25, None)


def test_a_checkpoint_has_the_config_of_its_stage() -> None:
    meta: dict[str, Any] = {"config": plain(config(*THREE))}
    resolutions = {step: parse_trained({**meta, "step": step}, "test").data.resolution for step in (0, 40, 41, 100)}
    assert resolutions == {0: 32, 40: 32, 41: 16, 100: 16}
    assert as_trained({**meta["config"], "stages": []}, 50) == as_trained(meta["config"], 40)


def resumed(old: TrainConfig, step: int, *overrides: str) -> list[str]:
    return check_resume(plain(old), config(*overrides), step)


def test_a_resume_compares_the_stages_that_were_trained() -> None:
    old = config(*THREE)
    assert resumed(old, 50, *THREE) == []
    # What is to come is free, and told.
    other = THREE[1].replace("flip: 0.25", "flip: 0.75").replace("until: 70", "until: 60")
    (told,) = resumed(old, 50, "train.steps=100", other)
    assert told.startswith("stages: ")
    for change, key in (("until: 40", "until: 39"), ("global_batch_size: 4", "global_batch_size: 8")):
        with pytest.raises(ConfigError, match="global_batch_size"):
            resumed(old, 50, "train.steps=100", THREE[1].replace(change, key))
    with pytest.raises(ConfigError, match=r"data\.resolution: 32 in the checkpoint, 16 now"):
        resumed(old, 50, *THREE, "data.resolution=16")
    with pytest.raises(ConfigError, match="allow_change"):
        resumed(old, 50, "train.steps=100", THREE[1].replace("lr: 0.5", "lr: 0.25"))


def test_a_refusal_shows_the_stage_to_add() -> None:
    with pytest.raises(ConfigError) as error:
        resumed(config("train.steps=100"), 50, "train.steps=100", "data.resolution=16", "model.depth=3")
    assert "To go on with another data.resolution from step 50 on" in str(error.value)
    stage = "stages=[{until: 50}, {data: {resolution: 16}}]"
    assert f"'{stage}'" in str(error.value)
    resumed(config("train.steps=100"), 50, "train.steps=100", stage)
    with pytest.raises(ConfigError) as error:
        resumed(config("train.steps=100"), 50, "train.steps=100", "model.depth=3")
    assert "stage" not in str(error.value)


def test_a_refusal_keeps_the_stages_that_were_trained() -> None:
    old = config("train.steps=100", "stages=[{until: 40}, {data: {resolution: 16}}]")
    with pytest.raises(ConfigError) as error:
        resumed(old, 50, "train.steps=100", "stages=[{until: 40}, {data: {resolution: 16, flip: 0.75},"
                " train: {global_batch_size: 4}}]")  # fmt: skip
    shown = re.search(r"'(stages=.*)'", str(error.value))
    assert shown
    assert shown[1] == (
        "stages=[{until: 40}, {data: {resolution: 16}, until: 50}, {data: {flip: 0.75}, train: {global_batch_size: 4}}]"
    )
    resumed(old, 50, "train.steps=100", shown[1])


def test_where_the_data_of_a_stage_begin() -> None:
    c = config(*THREE)
    first, second, third = (begin_of(c, number) for number in range(3))
    assert (first[:3], second[:3], third[:3]) == ((0, 0, 0), (40, 320, 1), (70, 440, 2))
    assert [step for step, _ in third.before] == [0, 40]
    # Five steps of the data were skipped in the first stage, and three at the border, which are the second stage's.
    ranges = (SkippedRange(10, 5, ""), SkippedRange(40, 3, ""))
    begins = [begin_of(c, n, lambda step: skipped_before(ranges, step)) for n in range(3)]
    assert [begin[:2] for begin in begins] == [(0, 0), (45, 360), (78, 360 + 33 * 4)]


def test_new_data_begin_within_a_stage() -> None:
    c = config(*THREE, "data.first_step=50")
    second, third = begin_of(c, 1), begin_of(c, 2)
    assert (second.step, second.position, list(second.before)) == (50, 320 + 10 * 4, [])
    assert [step for step, _ in third.before] == [50]
    assert third.position == 440
    alone = begin_of(config("data.first_step=50", "train.steps=100"), 0)
    assert (alone.step, alone.position) == (50, 400)


def test_a_forecast_refuses_stages() -> None:
    rungs = Rungs("mmdit_debug_mup.yaml", THREE, (32,), (10,), 1)
    with pytest.raises(ConfigError, match=r"one stage.*add stages=\[\]"):
        assert rungs.target
