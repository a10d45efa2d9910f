"""Rollback: after a row of skipped steps a run returns to its newest checkpoint and leaves out the samples since. A run
that goes on skipping, or whose validation is not finite, has diverged and ends."""

import math
import shutil
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from .checkpoint.find import complete_checkpoints, newest_good, set_aside, step_of
from .errors import DivergedError, RunError
from .recovery.skipped_ranges import skip_back, write_skipped_ranges
from .run import Run

MOST_IN_A_ROW = 3  # rollbacks to the same checkpoint
END_ROW = 10  # skipped steps on which no run finishes
_ADVICE = "lower optim.lr or lengthen optim.warmup_steps, and look for NaNs in latents and encoder weights"


def go_back(run: Run, row: int) -> None:
    """Return to the newest complete checkpoint after `row` skipped steps in a row. All ranks make this call alike.

    Raises RunError where there is no checkpoint, or where going back to it has not helped.
    """
    state, present = run.state, run.state.step
    run.checkpointer.wait()
    checkpoint, damaged = newest_good(run.folder, run.world.control)
    why = f"{row} steps in a row were skipped before step {present} (train.rollback_after {run.plan.rollback_after})"
    advice = "lower optim.lr or lengthen optim.warmup_steps"
    if checkpoint is None:
        raise RunError(f"{why}, and there is no checkpoint to go back to: {advice}, or set train.checkpoint_every")
    target = int(checkpoint.name.removeprefix("step_"))
    if target < run.plan.first_step:
        raise RunError(
            f"{why}, and {checkpoint}, the newest to go back to, is before step {run.plan.first_step}, at which "
            f"{run.plan.stage} begins: {advice}"
        )
    if sum(skipped.at_step == target for skipped in state.skipped_ranges) >= MOST_IN_A_ROW:
        raise RunError(
            f"{why}, and the run has gone back to {checkpoint} {MOST_IN_A_ROW} times already: remove that "
            f"checkpoint to start from an older one, or {advice}"
        )
    skipped_ranges = skip_back(state.skipped_ranges, present, target, why)
    if run.world.rank == 0:
        # A damaged checkpoint that stays would count among those to keep, and the good one would be deleted.
        for path, damage in damaged.items():
            run.metrics.say(f"warning: {damage}; renamed to .corrupt and passed over")
            set_aside(path, damage)
        write_skipped_ranges(run.folder, skipped_ranges)
    dist.barrier(group=run.world.control)
    run.checkpointer.load(checkpoint, {**run.ema.tensors(), **state.tensors()})
    state.step, state.skipped_ranges = target, skipped_ranges
    state.spikes.forget_rows()
    if target == run.plan.first_step:
        state.spikes.forget()
    run.metrics.cut(target)
    text = f"{why}: back to step {target}, past the samples of {skipped_ranges[-1].steps} steps"
    run.metrics.say(text)
    run.metrics.status("running", target, text)


def check_health(run: Run, record: Mapping[str, Any], skipped_row: int) -> None:
    """Raise DivergedError, on all ranks alike, where more training helps no more.

    record: the line of metrics of the present step. skipped_row: steps in a row that were skipped up to now.
    """
    most, step = run.plan.max_skipped_steps, run.state.step
    if not most:
        return
    for key in ("val_loss", "val_loss_ema"):
        if not math.isfinite(record.get(key, 0.0)):
            raise _diverged(run, f"{key} is not finite after step {step}", skipped_row)
    # A rollback comes first, where one is wanted after a longer row.
    limit = max(most, run.plan.rollback_after) if step < run.last_step else min(most, END_ROW, step)
    if skipped_row and skipped_row >= limit:
        why = f"the last {skipped_row} steps up to step {step} were all skipped (train.max_skipped_steps {most})"
        raise _diverged(run, why, skipped_row)


def _diverged(run: Run, why: str, skipped_row: int) -> DivergedError:
    """The error. Checkpoints after which no step was taken are renamed, so that the run is not resumed from them."""
    run.checkpointer.wait()
    dist.barrier(group=run.world.control)
    found = complete_checkpoints(run.folder / "checkpoints")
    doubtful = [path for path in found if skipped_row and step_of(path) >= run.state.step - skipped_row]
    healthy = [path for path in found if path not in doubtful]
    dist.barrier(group=run.world.control)  # all ranks have seen them under their names
    if run.world.rank == 0:
        for path in doubtful:
            aside = path.with_name(f"{path.name}.diverged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    names = ", ".join(path.name for path in doubtful)
    renamed = f"; {names} renamed to .diverged, because no step was taken since" if doubtful else ""
    start = f"from {healthy[-1].name}" if healthy else "from the beginning"
    return DivergedError(f"{why}{renamed}. The same command starts again {start}: {_ADVICE}")
