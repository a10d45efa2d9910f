"""docs/internals.md, a map of the code from the docstrings of its files: see the head of the page."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Internals

Where everything is, and the two ways through the code that are asked for most. Written by
`python -m docs.internals_page > docs/internals.md`; a test holds it current. Words are explained in
[glossary.md](glossary.md), reasons for the larger decisions stand at the head of the files.

## The rooms

```
launch/   what a person runs: a parser and a call
   |
export/   checkpoints <-> weights of diffusers and of the official repositories
   |
trainer/  build (the composition root) puts together:
   |        config      what the run is told            mup        what each parameter is trained with, by name
   |        input       samples become tensors          parallel   how the model is sharded
   |        diffusion   what is learned                 checkpoint, recovery, monitor
   |      loop.py calls step.py (the losses), then engine.step (the update);
   |      search, estimate, coord_check and evaluate use the same parts; page shows run folders
   |
data/     samples, in an order that is arithmetic       models/    what is computed, on one device
```

Arrows go down: a room imports rooms below it, never above, and `models/` and `data/` know neither each other nor the
trainer. `tests/unit/test_imports.py` holds the table of who may import whom, that there is no circle of imports, and
how long a file (500 lines) and a function (60) may be. `models.configs`, `data.config` and `trainer.config` import no
torch, so that a wrong key is answered at once.

## The way of a learning rate: from YAML to the update

```
configs/NAME.yaml: optim.lr
  -> trainer/config/load.py      file, `extends:` and overrides become a TrainConfig (keys declared in schema.py)
  -> trainer/build/engine.py     build_mup_table, then build_engine
       models/mmdit.py           declares what the shapes of two widths cannot tell about a parameter's role
       trainer/mup/rules.py      role, optimizer -> factors on lr, weight decay and epsilon, init, multiplier
       trainer/mup/table.py      one row per parameter NAME with these factors
       trainer/mup/apply.py      param_groups: parameters with equal factors form a group; lr_scale is its muP factor
  -> trainer/parallel/fsdp.py    shards, and then makes the Update; build_engine compares each group with the table
each step:
     trainer/loop.py             engine.step(run.lr(step))
     trainer/lr_schedule.py      base_lr: warm-up and decay as a factor on optim.lr (it is run.lr)
     trainer/parallel/update.py  group lr = base lr x schedule x lr_scale; clip, AdamW or Muon, skip of a bad step
```

## The way of a sample: from the shard to the loss

```
at the start, once:
     data/index.py               rows of all samples (offset, size, width, height, caption length) from shard_index.py,
                                 for shards that storage.py finds
     data/stages.py              where a later stage of the run begins in them, with what the one before has left over
each step:
     data/buckets.py             which bucket the step reads
  -> data/order.py               which sample each slot of the global batch reads: arithmetic on (seed, index, step)
  -> data/reader.py              this rank's slots, cut into micro-batches, in worker processes
  -> data/samples.py             bytes of the samples, a chunk at a time; URLs are read ahead
  -> data/decode.py              image (images.py) and caption (captions.py); flip, crop, the choice of a caption and
                                 its drop are drawn from the sample's key; an unreadable sample becomes a hole
  -> data/batch.py               the rows of a Batch
  -> trainer/input/stream.py     the encoding of the next step begins; after a rollback it begins anew, past the samples
                                 that were bad
  -> trainer/input/encoding.py   data/encoders: autoencoder.py and text.py; x0 and condition on the device
  -> trainer/loop.py             train_step: the micro-batches of a step
  -> trainer/step.py             draw (diffusion/flow.py), model (models/mmdit.py), loss per sample
```

## Where is ...?

| | |
|---|---|
| gradient clipping, skipped steps, AdamW | `step` in `trainer/parallel/update.py`; under DeepSpeed in `zero.py` |
| the threshold of a spike | `trainer/recovery/spikes.py` |
| initialisation | `declarations` of the backbone and `trainer/mup/rules.py`; `trainer/mup/apply.py` does it |
| which of its captions a sample gets | `pick` in `data/captions.py`; `data/decode.py` draws it, and the drop |
| signals | in each process `trainer/recovery/signals.py`; `stop_signal.py` tells all ranks, and the loop then saves |
| signals before that | `launch/workers.py` (`mudit train`), a trap in `launch/slurm/train.sbatch` (Slurm) |
| a hung or lost rank | `trainer/recovery/watchdog.py` |
| which checkpoint a run resumes | `trainer/checkpoint/resume.py`, and `find.py` for damaged ones |
| what a stage may change | `trainer/config/stages.py`; `launch/train.py` trains one after the other |
| what may change on resume | each key's class in `trainer/config/schema.py`, compared in `trainer/config/resume.py` |
| activation checkpointing, compilation | `trainer/parallel/activation_checkpointing.py`, `compile.py` |
| tokens that skip blocks | `models/route.py`; which ones: `trainer/diffusion/route.py` |
| guidance, classifier-free or by the route | `trainer/diffusion/sampling.py`, `trainer/evaluate/generate.py` |
| the EMA | `trainer/ema.py` |
| the line on the terminal, metrics.jsonl, trackers | `metrics.py`, `records.py` and `tracking/` in `trainer/monitor/` |
| the page of `mudit watch` and `report` | `run_data.py`, `panels.py` and `templates/page.js` in `trainer/page/` |
| FLOPs | of a backbone: `multiply_adds` in `models/configs.py`; of a training step: `trainer/build/flops.py` |
| MFU | `trainer/loop.py` |
| the price of a run before it is queued | `report.py`, `memory.py`, `step_time.py` in `trainer/estimate/` |
| Muon's polar factors | `trainer/parallel/polar.py` |
| names of weights in other projects | `export/names.py` |
| the Slurm script | `launch/slurm/train.sbatch`, filled in by `launch/slurm/job.py` |

## Every file
"""

ROOMS = {
    "models": "What is computed, on one device. No file here knows the data, the trainer or other processes.",
    "data": "Where batches come from. Rank and world size arrive as integers.",
    "trainer": "How it is trained.",
    "export": "Models in and out of diffusers and of the official repositories.",
    "launch": "What a person runs: a parser and a call.",
    "examples": "The demo and its data; CIFAR-10.",
    "docs": "Pages that are made from the code.",
}


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


def folders(room: str) -> Iterator[tuple[str, list[Path]]]:
    """Each folder of a room that has files, with them."""
    paths = sorted(path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py")
    for folder in sorted({path.parent for path in paths}):
        yield folder.relative_to(ROOT).as_posix(), [path for path in paths if path.parent == folder]


def document() -> str:
    """The page."""
    lines = [HEAD]
    for room, sentence in ROOMS.items():
        lines += [f"### {room}/", "", sentence, ""]
        for folder, paths in folders(room):
            lines += [f"| {folder}/ | |", "|---|---|", *(f"| `{path.name}` | {summary(path)} |" for path in paths), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(document(), end="")
