"""A worker: takes trials from the study, one after another, and trains them in this process (or this torchrun)."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ..collectives import from_rank_0, on_rank_0
from ..errors import CheckpointError, DivergedError
from ..estimate.micro_batch import Fitting
from ..monitor.metrics import read_metrics
from ..parallel.mesh import World
from ..run import Run
from .definition import Search
from .space import Point, as_overrides
from .study import Claim, State, Study
from .training import train_quietly

OBJECTIVE = "val_loss_ema"


class EarlyEnd(Exception):
    """A trial is not worth its remaining steps."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(f"{state}: {reason}")
        self.state: State = state
        self.reason = reason


class Worker:
    """One process, or all ranks of a torchrun: rank 0 speaks with the study, the others follow it."""

    def __init__(
        self, search: Search, world: World, say: Callable[[str], None], fitting: Fitting | None = None
    ) -> None:
        """say: a line for the person at the terminal (called on rank 0). fitting: the proxy's micro-batch."""
        self._search, self._world, self._say, self._fitting = search, world, say, fitting
        self._study = on_rank_0(world, lambda: Study.open(search))
        self._folder = search.folder
        self._device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"

    def work(self) -> None:
        """Run trials until none is left to take, or until a signal asks to stop; what runs is saved then."""
        outcome = "finished"
        while outcome == "finished":
            claim, taken = self._claim()
            if taken is None:
                return
            outcome = self._trial(claim, *taken)

    def _claim(self) -> tuple[Claim | None, tuple[int, Point] | None]:
        """(the claim, on rank 0; number and point, on all ranks)."""
        claim = on_rank_0(self._world, lambda: self._study.claim() if self._study else None)
        return claim, from_rank_0(self._world, lambda: (claim.number, claim.point) if claim else None)

    def _trial(self, claim: Claim | None, number: int, point: Point) -> str:
        """All seeds of a point; the outcome goes to the study."""
        self._tell(f"trial {number} starts: {' '.join(as_overrides(point))}")
        losses: list[float] = []
        state, reason = "complete", ""
        attributes: dict[str, Any] = {"processes": self._world.size, "device": self._device}
        try:
            for seed in range(self._search.seeds):
                outcome, loss, of_run = self._run(claim, number, seed, point)
                attributes |= of_run
                if outcome == "preempted":
                    self._tell(f"trial {number} is saved: start the search again to go on")
                    return outcome
                losses.append(loss)
        except EarlyEnd as end:
            state, reason = end.state, end.reason
        except DivergedError as end:
            state, reason = "diverged", str(end)
        if self._study and claim:
            self._study.finish(claim, cast(State, state), losses, reason, **attributes)
        self._tell(f"trial {number} is {state}: {reason or f'{OBJECTIVE} {sum(losses) / len(losses):.4g}'}")
        return "finished"

    def _run(self, claim: Claim | None, number: int, seed: int, point: Point) -> tuple[str, float, dict[str, Any]]:
        """(how the run ended, its objective, its commit and table); raises EarlyEnd."""
        of_run: dict[str, Any] = {}

        def begin(run: Run) -> None:
            of_run.update(commit=run.meta["commit"], table=run.meta["mup"]["sha256"])
            identity = run.meta["fingerprints"] | {"validation": run.meta["validation"]}
            on_rank_0(self._world, lambda: self._study.check_data(identity) if self._study else None)

        def look(record: Mapping[str, Any]) -> None:
            self._look(claim, number, seed, record)

        config = self._search.run_config(self._folder, number, seed, point)
        log = self._folder / "logs" / f"{number:04d}_rank{self._world.rank}.log"
        ended = train_quietly(config, self._world, log, self._fitting, begin, look)
        if ended.outcome != "finished":
            return ended.outcome, math.nan, of_run
        return ended.outcome, from_rank_0(self._world, lambda: _objective(ended.folder, ended.step)), of_run

    def _look(self, claim: Claim | None, number: int, seed: int, record: Mapping[str, Any]) -> None:
        """End the trial, on all ranks alike, where a figure is not finite or the study's verdict is against it."""
        step = record["step"]
        for key in ("loss", "val_loss", OBJECTIVE):
            if not math.isfinite(record.get(key, 0.0)):
                raise EarlyEnd("diverged", f"{key} is not finite at step {step}")
        if record.get("skipped_steps") and "loss" not in record:
            raise EarlyEnd("diverged", f"no step since the last log line had finite gradients, step {step}")
        if OBJECTIVE not in record:
            return
        loss = record[OBJECTIVE]
        steps = self._search.proxy().train.steps
        self._tell(f"trial {number}  step {step}/{steps}  {OBJECTIVE} {loss:.4g}")
        verdict = from_rank_0(self._world, lambda: self._verdict(claim, seed, step, loss))
        if verdict is not None:
            raise EarlyEnd(*verdict)

    def _verdict(self, claim: Claim | None, seed: int, step: int, loss: float) -> tuple[State, str] | None:
        if self._study is None or claim is None:
            return None
        # The study knows one curve per trial: that of its first seed.
        return self._study.diverged(claim.number, step, loss) if seed else self._study.report(claim, step, loss)

    def _tell(self, text: str) -> None:
        if self._world.rank == 0:
            self._say(text)


def _objective(folder: Path, step: int) -> float:
    """The objective of a run after its last step. Raises CheckpointError where it is not in metrics.jsonl."""
    for record in reversed(read_metrics(folder)):
        if record["step"] == step and record.get(OBJECTIVE) is not None:
            return record[OBJECTIVE]
    raise CheckpointError(
        f"{folder / 'metrics.jsonl'} has no {OBJECTIVE} at step {step}: the disk was full, or the file is damaged. "
        f"Remove {folder}, and the same command trains the trial again"
    )
