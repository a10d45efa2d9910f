"""Does the forecast hold? Rungs, a law registered before the target is trained, the target, and a planted break.

    python -m benchmarks.forecast --study mmdit_cpu --folder runs/forecast_mmdit --output docs/forecast_mmdit.json

1. Rungs of several widths and durations, three seeds, by the command's own workers; their forecast is registered.
2. The target, wider than each rung, on seeds that no rung had, following the registered forecast.
3. Further seeds of the rungs: studies of three of them, each against a run of the target.
4. A width trained at four times the rate: it must be refused.

The same command again goes on where it stopped. Exit code 1 says that the forecast falls short.
"""

import argparse
import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from data.files import parse_json
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.files import json_text, write_atomically
from trainer.forecast.fit import Rung, fit_rungs
from trainer.forecast.report import forecast_target, write_forecast
from trainer.forecast.rungs import Rungs, read_points
from trainer.forecast.track import FORECAST
from trainer.monitor.records import read_metrics
from trainer.parallel.mesh import World, init_world
from trainer.search.training import train_quietly
from trainer.search.trunk_worker import Worker, open_folder
from trainer.search.trunks import OBJECTIVE

_FIRST_TARGET_SEED = 1000  # beside the rungs', which start at 0
_BREAK = 4.0  # times the rate


@dataclasses.dataclass(frozen=True)
class Study:
    """steps: of the rungs; the target has the most of them. all_seeds: of the rungs in the end; seeds: of a study.
    broken: the width that is trained wrongly."""

    config: str
    overrides: tuple[str, ...]
    width: int
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    broken: int
    seeds: int = 3
    all_seeds: int = 5
    target_seeds: int = 3


STUDIES = {
    "mmdit_cpu": Study(
        "mmdit_demo_mup.yaml",
        ("model.depth=2", "train.global_batch_size=32", "data.resolution=16", "objective.shift_base_tokens=16",
         "mup.base_width=64", "optim.lr=4e-3", "optim.schedule=wsd", "optim.decay_steps=120", "optim.warmup_steps=20",
         "ema.decays=[0.96]", "validation.samples=128", "train.sample_every=0"),
        256, (64, 96, 128, 192), (150, 300, 600), 128,
    ),
    "tiny": Study(
        "mmdit_debug_mup.yaml",
        ("model.depth=1", "validation.samples=4", "optim.warmup_steps=1", "optim.schedule=wsd", "optim.decay_steps=4",
         "ema.decays=[0.8]", "train.sample_every=0"),
        96, (32, 48, 64), (6, 10, 16), 48, seeds=1, all_seeds=1, target_seeds=1,
    ),
}  # fmt: skip


def rungs_of(study: Study, folder: Path, seeds: int, *more: str, name: str = "study") -> Rungs:
    """The rungs of a study, as the command reads them."""
    own = [*study.overrides, f"model.width={study.width}", f"train.steps={study.steps[-1]}", f"run.dir={folder}"]
    set_here = {text.partition("=")[0] for text in more}
    own = [text for text in own if text.partition("=")[0] not in set_here]
    widths, steps = (",".join(map(str, each)) for each in (study.widths, study.steps))
    return Rungs.of(study.config, [*own, *more, f"run.name={name}"], widths, steps, seeds)


def trained_rungs(rungs: Rungs, world: World) -> list[Rung]:
    open_folder(rungs)
    if not Worker(rungs, world, lambda text: print(text, flush=True)).work():
        raise SystemExit("the study was asked to stop: run the same command again")
    return [Rung(float(p.parameters), float(p.images), p.seed, p.loss) for p in read_points(rungs)]


def registered(study: Study, folder: Path, world: World) -> dict[str, Any]:
    """The forecast, made once, before the target is trained."""
    path = folder / "registered"
    if not (path / FORECAST).is_file():
        rungs = rungs_of(study, folder, study.seeds)
        trained_rungs(rungs, world)
        if any((folder / f"target_{k}").exists() for k in range(study.target_seeds)):
            raise ConfigError(f"{folder} holds runs of the target, and no forecast from before them: use another one")
        write_forecast(forecast_target(rungs), path)
    return parse_json((path / FORECAST).read_bytes())


def target_runs(study: Study, folder: Path, forecast: Path, world: World) -> list[dict[str, Any]]:
    """Each run of the target: its last loss, and how many of its validations lay in the forecast's interval."""
    found = []
    for k in range(study.target_seeds):
        target = rungs_of(study, folder, study.seeds).overrides
        own = [text for text in target if not text.startswith(("run.name", "train.seed"))]
        refused = parse_json(forecast.read_bytes())["refused"]
        follow = [] if refused else [f"run.forecast={forecast}"]
        every = max(1, study.steps[-1] // 12)
        config = load_config(
            study.config,
            [
                *own,
                f"run.name=target_{k}",
                f"train.seed={_FIRST_TARGET_SEED + k}",
                f"train.validate_every={every}",
                *follow,
            ],
        )
        ended = train_quietly(config, world, folder / "logs" / f"target_{k}.log")
        records = [r for r in read_metrics(ended.folder) if OBJECTIVE in r]
        followed = [r for r in records if "forecast/loss" in r]
        inside = sum(r["forecast/low"] <= r[OBJECTIVE] <= r["forecast/high"] for r in followed)
        found.append({
            "seed": config.train.seed, "loss": records[-1][OBJECTIVE], "followed": len(followed), "inside": inside,
            "course": {r["step"]: r[OBJECTIVE] for r in records},
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def resampled(study: Study, rungs: Sequence[Rung], parameters: float, images: float, losses: Sequence[float]) -> Any:
    """Studies of each choice of `seeds` seeds out of all, each against one run of the target in turn."""
    studies = []
    for number, seeds in enumerate(itertools.combinations(range(study.all_seeds), study.seeds)):
        fit = fit_rungs([rung for rung in rungs if rung.seed in seeds], seed=number)
        each, loss = fit.loss(parameters, images), losses[number % len(losses)]
        held = each.low <= loss <= each.high
        studies.append({"seeds": seeds, **each._asdict(), "measured": loss, "inside": held, "refused": fit.refused})
    return studies


def broken(study: Study, folder: Path, rungs: Sequence[Rung], world: World) -> list[str]:
    """Why the rungs are refused when those of one width were trained at _BREAK times the rate."""
    lr = load_config(study.config, list(study.overrides)).optim.lr
    wrong = rungs_of(study, folder, study.seeds, f"optim.lr={_BREAK * lr}", name="broken")
    wrong = dataclasses.replace(wrong, widths=(study.broken,))
    replaced = trained_rungs(wrong, world)
    kept = [rung for rung in rungs if rung.parameters != replaced[0].parameters and rung.seed < study.seeds]
    return fit_rungs([*kept, *replaced]).refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of all runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the picture of the forecast lies beside it")
    arguments = parser.parse_args()
    study, folder = STUDIES[arguments.study], arguments.folder
    world = init_world(1)
    forecast = registered(study, folder, world)
    write_atomically(
        arguments.output.with_name(f"{arguments.output.stem}_registered.json"), json_text(forecast, indent=1) + "\n"
    )
    targets = target_runs(study, folder, folder / "registered" / FORECAST, world)
    rungs = trained_rungs(rungs_of(study, folder, study.all_seeds), world)
    losses = [each["loss"] for each in targets]
    studies = resampled(study, rungs, forecast["parameters"], forecast["images"], losses)
    low, high = forecast["interval"]
    found = {
        "study": dataclasses.asdict(study),
        "registered": {key: forecast[key] for key in (
            "date", "refused", "reasons", "loss", "interval", "exponents", "exponents_interval", "floor",
            "floor_interval", "optimal_parameters", "optimal_parameters_interval", "fit", "rungs_digest")},
        "target": {"runs": targets, "inside": sum(low <= loss <= high for loss in losses)},
        "resampled": {"studies": studies, "inside": sum(each["inside"] for each in studies)},
        "planted_break": broken(study, folder, rungs, world),
        "rungs": [vars(rung) for rung in rungs],
    }  # fmt: skip
    shutil.copyfile(folder / "registered" / "forecast.png", arguments.output.with_suffix(".png"))
    write(arguments.output, found)
    passed = (
        found["target"]["inside"] >= 0.8 * len(losses)
        and found["resampled"]["inside"] >= 0.8 * len(studies)
        and found["planted_break"]
    )
    print(
        f"target inside {found['target']['inside']} of {len(losses)}, studies inside {found['resampled']['inside']} of "
        f"{len(studies)}; with a planted break: {found['planted_break'] or 'NOT REFUSED'}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
