"""Rollback: after a row of skipped steps a run returns to its newest checkpoint and leaves out the samples since."""

import torch.distributed as dist

from .checkpoint.find import newest_good, set_aside
from .errors import RunError
from .recovery.skipped_ranges import skip_back, write_skipped_ranges
from .run import Run

MOST_IN_A_ROW = 3  # rollbacks to the same checkpoint


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
    run.metrics.cut(target)
    text = f"{why}: back to step {target}, past the samples of {skipped_ranges[-1].steps} steps"
    run.metrics.say(text)
    run.metrics.status("running", target, text)
