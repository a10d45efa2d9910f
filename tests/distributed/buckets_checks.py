"""Runs over several buckets, of every backbone, in one start: python -m tests.distributed.buckets_checks FOLDER URL."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import trainer.build.engine
import trainer.build.run
from data.encoders.joined import load_text_encoders
from trainer.build.run import build_run
from trainer.config.load import load_config
from trainer.input.encoding import read_text_encoder
from trainer.input.stream import prefetch
from trainer.loop import train
from trainer.parallel.compile import compile_units
from trainer.parallel.mesh import World, init_world, world_size

STEPS = 8
COMMON = (
    "data.buckets=aspect", "train.log_every=1", "train.validate_every=8", "train.sample_every=0",
    "train.checkpoint_every=0", "train.micro_batch_size=0.03125", "parallel.precision=fp64",
)  # fmt: skip
TEXT = ("data.text_lengths=[24,48]", "text_encoder.dropout=0.3")
ZERO = ("parallel.engine=zero", "parallel.zero_stage=2", "parallel.precision=fp32")
SHARES = {"train": 2, "more": 1}
BACKBONES = {
    "mmdit_debug_mup.yaml": ("model.pos_embed_max_size=11", *TEXT),
    "pixart_debug_mup.yaml": ("model.micro_conditions=true", "model.width=96", "mup.base_width=48", *TEXT),
    "dit_debug_mup.yaml": (),
    "uvit_debug_mup.yaml": ("model.input_size=11",),
}


def sources(where: Path | str) -> tuple[str, ...]:
    """Overrides: two sources in a folder, or below a URL."""
    shards = [
        f"{{shards: '{where}/{name}-000000.tar', weight: {weight}}}" for name, weight in (("train", 2), ("more", 1))
    ]
    return "data.shards=synthetic", f"data.sources=[{', '.join(shards)}]", f"data.val_shards={where}/more-000000.tar"


def sharded_encoder_equals_a_whole_one(world: World, folder: Path) -> float:
    """Largest difference; the ranks have other captions, one of them none, and each call must end on both. T5; and a
    language model in a chat, beside CLIP with its pooled vector."""
    worst = 0.0
    clip = f"{{path: {folder}/clip, max_length: 20, width: 32, pooled_width: 24}}"
    chat = (f"text_encoder={{path: {folder}/qwen3, width: 64, chat: Describe, layers: [-2, -1], more: [{clip}]}}",)
    for precision, dtype, text in (
        ("fp32", torch.float32, ()),
        ("fp64", torch.float64, ()),
        ("fp32", torch.float32, chat),
        ("fp64", torch.float64, chat),
    ):
        settings = [f"parallel.precision={precision}", *text, "text_encoder.shard=true"]
        config = load_config("mmdit_debug_mup.yaml", settings)
        whole = load_text_encoders(config.text_encoder, "cpu", dtype)
        sharded = read_text_encoder(config, world, dtype)
        assert (sharded.fingerprint, sharded.weights) == (whole.fingerprint, whole.weights)
        for part, whole_part in zip(sharded.parts, whole.parts, strict=True):
            held = sum(p.to_local().numel() for p in part.model.parameters() if isinstance(p, DTensor))
            assert 0.4 < held / sum(p.numel() for p in whole_part.model.parameters()) < 0.6, "each rank holds its part"
        for mine in (["a", "bb", "a", ""], ["ccc", "d", "ee", "f"], [""] * 4):
            captions = mine if world.rank == 0 else [""] * 4
            for length in (None,) if text else (None, 3):
                states, mask, pooled = sharded.encode_pooled(captions, length)
                wanted, wanted_mask, wanted_pooled = whole.encode_pooled(captions, length)
                assert (mask == wanted_mask).all()
                assert (pooled.shape[1] == 24) == bool(text)
                worst = max(
                    worst,
                    float(
                        (torch.cat([states.flatten(1), pooled], 1) - torch.cat([wanted.flatten(1), wanted_pooled], 1))
                        .abs()
                        .max()
                    ),
                )
    return worst


def run(world: World, folder: Path, name: str, config: str, steps: int, *more: str) -> None:
    """Train in folder/name, or go on there."""
    shards = folder / "shards" / "train-000000.tar"
    settings = [f"data.shards={shards}", f"data.val_shards={shards}", f"train.steps={steps}", *COMMON]
    settings += [f"run.dir={folder}", f"run.name={name}", "run.allow_change=[train.steps]", *more]
    job = build_run(load_config(config, [*settings, *BACKBONES[config]]), world)
    try:
        train(job)
    finally:
        job.metrics.close()


if __name__ == "__main__":
    path, url, size = Path(sys.argv[1]), sys.argv[2], world_size()
    here = init_world(size)
    try:
        for backbone in BACKBONES:
            run(here, path, f"{backbone}-{size}", backbone, STEPS)
        # One process reads files itself, two have reader processes for a web server.
        remote = (*sources(url), "data.num_workers=2", f"data.index_cache={path}/index")
        run(
            here,
            path,
            f"sources-{size}",
            "mmdit_debug_mup.yaml",
            STEPS,
            *(remote if size > 1 else sources(path / "shards")),
        )
        # Begun in one process, ended by two.
        run(here, path, "resumed", "mmdit_debug_mup.yaml", STEPS if size > 1 else STEPS // 2)
        if size > 1:
            run(here, path, "sharded", "mmdit_debug_mup.yaml", STEPS, "text_encoder.shard=true")
            difference = sharded_encoder_equals_a_whole_one(here, path)
            (path / f"difference-{here.rank}").write_text(repr(difference))
            run(here, path, "zero", "mmdit_debug_mup.yaml", STEPS // 2, *ZERO)
        else:
            trainer.build.run.prefetch = lambda batches, begin, ahead: prefetch(batches, begin, ahead=0)
            run(here, path, "not_ahead", "mmdit_debug_mup.yaml", STEPS)
            # Without code generation, which takes long: graphs and shapes are what is looked at.
            trainer.build.engine.compile_units = partial(compile_units, backend="eager")
            run(here, path, "compile", "mmdit_debug_mup.yaml", STEPS // 2, "parallel.compile=true")
    finally:
        dist.destroy_process_group()
