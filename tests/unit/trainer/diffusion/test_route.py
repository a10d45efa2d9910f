"""A run whose model has a route of tokens: who sees which of them, what is trained, priced, resumed and refused."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.forms import refusals
from models.flops import forward_flops
from tests.distributed.runs import exact, train
from tests.helpers.steps import QUIET, built
from trainer.build.engine import build_objective, build_route
from trainer.build.flops import image_flops
from trainer.build.meta import meta_inputs, meta_model
from trainer.config.keys import plain
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.resume import check_resume
from trainer.diffusion.random import subset
from trainer.diffusion.repa import Alignment
from trainer.errors import ConfigError
from trainer.estimate.arithmetic import count_passes, products_flops
from trainer.estimate.simulation import profile
from trainer.loop import train_step
from trainer.run import Run
from trainer.step import micro_batch_losses

KINDS = ("mmdit", "pixart", "dit", "uvit")


def routed(kind: str, fuse: str = "none") -> tuple[str, ...]:
    """Three blocks, of which the second sees a quarter of the tokens; U-ViT has five, and three see it."""
    end, depth = (4, 4) if kind == "uvit" else (2, 3)
    route = {"share": 0.75, "start": 1, "end": end, "fuse": fuse}
    return (f"model.depth={depth}", *(f"model.route.{key}={value}" for key, value in route.items()))


@contextmanager
def kept_by(run: Run) -> Iterator[list[Tensor | None]]:
    """What the model is called with meanwhile."""
    seen: list[Tensor | None] = []
    hook = run.engine.model.register_forward_pre_hook(
        lambda _, args, named: seen.append(named.get("kept")), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_by_the_samples_keys_and_all_else_sees_all_tokens(kind: str, tmp_path: Path) -> None:
    more = ("data.shards=.cache/debug/train-{000000..000001}.tar", "train.validate_every=1", "train.sample_every=1")
    with built(
        f"{kind}_debug_mup.yaml", tmp_path, *routed(kind, "sprint"), *more, "train.micro_batch_size=0.03"
    ) as run:
        micro_batches = next(run.batches())
        keys = [each.batch.keys for each in micro_batches]
        with kept_by(run) as seen:
            train_step(run, micro_batches)
        assert len(seen) == len(keys) > 1
        for kept, of_rows in zip(seen, keys, strict=True):
            assert kept is not None
            assert torch.equal(kept, subset(of_rows, 64, 16, "route"))
        with kept_by(run) as seen:
            run.validate()
            run.sample(tmp_path / "a.png")
        assert len(seen) > 1
        assert seen == [None] * len(seen)


@pytest.mark.parametrize("fuse", ["none", "sprint"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(kind: str, fuse: str, tmp_path: Path) -> None:
    norms = []
    for name, rows in (("whole", ()), ("parts", ("train.micro_batch_size=0.03",))):
        keys = (*routed(kind, fuse), "parallel.precision=fp64", *rows, "train.log_every=3")
        with built(f"{kind}_debug_mup.yaml", tmp_path / name, *keys) as run:
            for micro_batches in islice(run.batches(), 2):
                train_step(run, micro_batches)
            norms.append(run.state.totals.clone())
    assert torch.allclose(*norms, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_a_resume_is_exact(tmp_path: Path) -> None:
    keys = (*routed("mmdit", "sprint"), "train.steps=4", "train.checkpoint_every=2", "train.sample_every=0")
    records = train(1, tmp_path / "whole", *keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_00000004")
    assert exact(train(1, tmp_path / "half", *keys)) == exact(records)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_alignment_in_the_route_is_of_the_kept_tokens(layer: int, tmp_path: Path) -> None:
    keys = (*routed("dit"), "objective.repa_weight=0.5", f"objective.repa_layer={layer}", "objective.repa_width=16")
    config = load_config("dit_debug_mup.yaml", [*QUIET, *keys])
    route, found = build_route(config), list[tuple[Tensor, Tensor]]()

    class Noted(Alignment):
        def losses(self, projected: Tensor, features: Tensor) -> Tensor:
            found.append((projected, features))
            return super().losses(projected, features)

    with built("dit_debug_mup.yaml", tmp_path, *keys) as run:
        [micro_batch] = next(run.batches())
        encoded, alignment = micro_batch.encoded(), run.alignment
        assert alignment is not None
        assert route is not None
        features = alignment.features(micro_batch.batch)
        noted: Any = Noted(0.5, layer - 1, alignment.features)
        objective = build_objective(config, resolve(config, 1))
        micro_batch_losses(run.engine.model, objective, noted, encoded, features, route)
    [(projected, compared)] = found
    kept = route.kept(encoded.x0, encoded.keys)
    expected = features.gather(1, kept[..., None].expand(-1, -1, 16)) if layer == 2 else features
    assert projected.shape == compared.shape
    assert torch.equal(compared, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_priced_by_the_tokens_that_go_through_the_route(kind: str) -> None:
    config = load_config(f"{kind}_debug_mup.yaml", [*QUIET, *routed(kind, "sprint")])
    text = config.text_encoder
    given = (config.model, config.autoencoder.channels, text.width, config.image_tokens, text.max_length)
    assert image_flops(config) == 3 * forward_flops(*given, routed=True) < 3 * forward_flops(*given)
    passes = count_passes(meta_model(config), meta_inputs(config, 3))
    assert products_flops(passes.blocks) + products_flops(passes.rest) == image_flops(config)
    step = profile(config, 4).steps[0]
    assert 3 * step.flops["forward"] == step.rows * image_flops(config)


def test_what_does_not_go_with_a_route() -> None:
    keys = routed("mmdit", "sprint")
    with pytest.raises(ConfigError, match=r"mup.base_depth does not fit model.route.fuse sprint"):
        load_config("mmdit_debug_mup.yaml", [*keys, "mup.base_depth=3"])
    load_config("mmdit_debug_mup.yaml", [*routed("mmdit"), "mup.base_depth=3"])
    with pytest.raises(ConfigError, match=r"model.route from 1 to 3 does not fit 3 blocks"):
        load_config("mmdit_debug_mup.yaml", [*keys, "model.route.end=3"])
    with pytest.raises(ConfigError, match=r"model.route.end"):
        load_config("mmdit_debug_mup.yaml", ["model.route.share=0.5", "model.route.start=1"])


@pytest.mark.parametrize("form", ["diffusers", "official"])
def test_a_fused_model_is_not_exported(form: Any) -> None:
    """One without the layer is: it is the model that it would be without a route."""
    kind, more = ("dit", ("model.time_freq_shift=1",)) if form == "diffusers" else ("uvit", ())
    plain, fused = (load_config(f"{kind}_debug_mup.yaml", [*routed(kind, fuse), *more]) for fuse in ("none", "sprint"))
    assert list(refusals(plain, form)) == []
    [reason] = refusals(fused, form)
    assert "no other code base has the layer of model.route.fuse sprint" in reason


def test_an_older_checkpoints_config_has_no_route(tmp_path: Path) -> None:
    config = load_config("mmdit_debug_mup.yaml")
    old = plain(config)
    del old["model"]["route"]
    assert check_resume(old, config, 4) == []
    with pytest.raises(ConfigError, match=r"model.route.share: None in the checkpoint, 0.75 now; it is part of what"):
        check_resume(old, load_config("mmdit_debug_mup.yaml", routed("mmdit")), 4)
