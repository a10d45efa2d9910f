"""The training loop, top to bottom. Nothing in a step waits for the device; figures are read back at log steps."""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data.files import json_digest

from .errors import BadDataError, CheckpointError, RunError
from .monitor.mup_health import time_figures
from .parallel.engine import Engine
from .recovery.bad_data import BadData, bad_share_message, outage_message
from .recovery.stop_signal import StopSignal
from .recovery.watchdog import Watchdog
from .rollback import check_health, go_back
from .run import Run
from .state import StepSums, Totals, TrainState
from .step import Alignment, Encoded, MicroBatch, Objective, Route, micro_batch_losses


def train(run: Run) -> str:
    """Train to the end; returns "finished" or "preempted", or "running" where it has come to the end of a stage that is
    not the last one. Raises RunError where the run cannot go on."""
    plan, state, metrics = run.plan, run.state, run.metrics
    if state.step >= run.last_step:
        metrics.say(f"{run.folder} has finished its {state.step} steps; nothing to do")
        metrics.status("finished", state.step)
        return "finished"
    metrics.status("running", state.step)
    lag = plan.every.log if run.world.device.type == "cuda" else 0
    stop_signal = StopSignal(run.world.control, lambda reason: metrics.status("preempted", state.step, reason))
    factor, min_s = plan.watchdog_factor, plan.watchdog_min_s
    watchdog = Watchdog(run.folder, run.world, factor, min_s, lag, lambda: stop_signal.asked)
    with watchdog, stop_signal:
        try:
            outcome, reason = _steps(run, stop_signal, watchdog)
            # What is due at the end of a stage takes time, in which no step tells of a signal.
            if outcome == "running" and stop_signal.any_asked():
                outcome, reason = "preempted", "asked to stop by a signal"
        except (RunError, CheckpointError) as error:  # on all ranks alike
            run.checkpointer.wait()  # what is on its way is worth keeping
            metrics.status("failed", state.step, str(error))
            raise
        except BaseException as error:
            run.checkpointer.wait()
            cause = watchdog.blame(error)
            if cause is not error:
                raise cause from None
            raise
        with watchdog.phase("ending"):
            metrics.status(outcome, state.step, reason)
            metrics.plot(last=True)
            # Rank 0 must have written all this: after a signal torchrun ends with an error, and Slurm then ends the
            # job on all nodes.
            dist.barrier(group=run.world.control)
    return outcome


def _steps(run: Run, stop_signal: StopSignal, watchdog: Watchdog) -> tuple[str, str]:
    """Train until the last step, or until the ranks agree to stop; returns the outcome and its reason."""
    plan, state = run.plan, run.state
    if state.step == 0:
        record = plan.place(0)
        _validate_sample_evaluate(run, watchdog, record, {"validate"} if plan.every.validate else set())
        check_health(run, record, skipped_row=0)
    batches = run.batches()
    run.timer.restart()
    reads_before, bad = _reads(state), BadData(plan.max_bad_share)
    to_save = False
    while state.step < run.last_step:
        train_step(run, next(batches))
        watchdog.beat(state.step)
        due = plan.every.due(state.step, run.last_step)
        # Counted since this start, so that a run goes on whose data were mended.
        holes, read = (now - then for now, then in zip(_reads(state), reads_before, strict=True))
        asked, holes, read = stop_signal.exchange(holes, read)
        bad.update(holes, read, state.holes)
        too_bad = "log" in due and bad.too_much
        record = plan.place(state.step)
        if "log" in due:
            record |= _figures(run) | {"bad_share": bad.share}
            watchdog.beat(state.step, record["step_time_s"])
            row = state.spikes.take_longest_row()
            if plan.rollback_after and row >= plan.rollback_after:
                with watchdog.phase("going back"):
                    go_back(run, row)
                run.timer.restart()
                continue
        if due & {"log", "validate", "sample", "evaluate"}:
            _validate_sample_evaluate(run, watchdog, record, due)
            check_health(run, record, state.spikes.row())
        stopping = (asked and (state.step < run.last_step or not plan.is_last)) or too_bad
        last = stopping or state.step == run.last_step
        to_save |= last or "checkpoint" in due
        if to_save or "snapshot" in due:
            bad.update(*stop_signal.latest(), state.holes)
            # Steps that learned from next to nothing are not kept: the data may be gone, which a few more steps tell.
            if not bad.lost or state.step == run.last_step:
                with watchdog.phase("saving"):
                    if "snapshot" in due:  # first, since it would wait for the larger checkpoint
                        meta = {**run.meta, "step": state.step}
                        run.checkpointer.save_averages(state.step, run.ema.tensors(), meta)
                    if to_save:
                        save(run, wait=last, validated=math.isfinite(record.get("val_loss", math.nan)))
                to_save = False
        if too_bad:
            raise BadDataError(
                outage_message(bad.lost, state.holes)
                if to_save
                else bad_share_message(state.step, bad, plan.max_bad_share, state.holes)
            )
        if stopping:
            unsaved = f"; not saved, because the last {bad.lost} samples could not be read" if to_save else ""
            return "preempted", f"asked to stop by a signal{unsaved}"
        if due:
            run.timer.restart()  # what was done beside training is not training time
    return plan.outcome(run.last_step)


def train_step(run: Run, micro_batches: list[MicroBatch]) -> None:
    """One update from this rank's micro-batches, which are taken out of the list one by one."""
    state, world = run.state, run.world
    alignment = run.alignment_at(state.step)
    logged = "log" in run.plan.every.due(state.step + 1, run.last_step)
    run.timer.watching = logged
    sums = StepSums.zeros(world.device)
    while micro_batches:
        batch, encoding = micro_batches.pop(0)  # a list that held it would keep its memory to the end of the step
        features = () if alignment is None else (alignment.features(batch),)
        sums += run.passes(encoding(), *features, last=not micro_batches)
        state.add_reads(batch.read, batch.holes)
    result = run.engine.step(run.lr(state.step), run.health if logged else None, state.spikes.limit())
    run.ema.update(state.step, result.skipped)
    state.spikes.update(result.grad_norm, result.skipped)
    # The sums are added up over ranks in every step, not only at log steps: so a checkpoint between two log lines holds
    # the same totals on all ranks, and a resumed run logs the same figures. It is one tensor of a few numbers.
    dist.all_reduce(sums)
    state.add_step(sums, result)
    state.step += 1


def forward_backward(
    engine: Engine,
    objective: Objective,
    alignment: Alignment | None,
    scale: float,
    encoded: Encoded,
    features: Tensor | None = None,
    *,
    route: Route | None = None,
    last: bool,
) -> Tensor:
    """The passes of a micro-batch: adds up its gradients, times `scale`, and returns its packed StepSums. features:
    None in a step without the alignment.

    All of it runs on the device, and between micro-batches of a shape nothing differs but the tensors: it can be
    recorded as a CUDA graph.
    """
    alignment = None if features is None else alignment
    losses = micro_batch_losses(engine.model, objective, alignment, encoded, features, route)
    engine.backward(scale * losses.total, last)
    return StepSums.of_micro_batch(losses, encoded).packed()


def save(run: Run, wait: bool = False, validated: bool = False) -> None:
    """Start to write a checkpoint of the present step. wait: until it is complete; CheckpointError where it fails.
    validated: its weights have a finite validation loss."""
    state = run.state
    reads: list[Any] = [None] * run.world.size
    dist.all_gather_object(reads, (state.holes, state.samples_read), group=run.world.control)
    meta = {**run.meta, "step": state.step, "reads": reads, "jumps": state.skipped_ranges}
    # The last step that was taken may have spoilt the weights; before it they were such that it could be taken.
    healthy_before = state.step + 1 if validated else state.step - state.spikes.row()
    run.checkpointer.save(state.step, {**run.ema.tensors(), **state.tensors()}, meta, wait, healthy_before)


def _figures(run: Run) -> dict[str, Any]:
    """The figures of the steps since the last log line. Reads the totals back, which is the host sync of a log step,
    and starts them anew."""
    state = run.state
    totals = Totals.unpacked(state.totals.to("cpu", copy=True))
    step_s = run.timer.step_s()  # only now has the device done the steps
    state.totals.zero_()
    figures: dict[str, Any] = {
        "lr": run.lr(state.step - 1),
        "skipped_steps": int(totals.skipped),
        "spike_steps": int(totals.spikes),
    }
    if skipped := state.data_step - state.step:
        figures["jumped_steps"] = skipped
    counted = float(totals.counted)
    if counted:
        figures["loss"] = float(totals.loss) / counted
        figures["grad_norm"] = float(totals.grad_norm) / counted
        if run.alignment_at(state.step - 1) is not None:  # of all steps since the last line, or of none
            figures["repa_loss"] = float(totals.repa_loss) / counted
        figures["mup/clip_share"] = float(totals.clipped) / counted
    figures |= time_figures(totals.by_time.tolist()) | run.health.figures() | run.checkpointer.figures()
    return figures | _speed(run, step_s, text_tokens=float(totals.text_tokens) / max(1.0, counted))


def _speed(run: Run, step_s: float, text_tokens: float) -> dict[str, Any]:
    """Throughput of the steps since the last log line. step_s: mean time per step. text_tokens: mean per image."""
    plan, buckets = run.plan, run.timer.buckets
    aligned = run.alignment_at(run.state.step - 1) is not None
    flops = sum(plan.image_flops(text_tokens, bucket, aligned) * steps for bucket, steps in buckets.items())
    images_per_s = plan.global_batch_size / step_s
    flops_per_s = flops / buckets.total() * images_per_s
    figures: dict[str, Any] = {
        "images_per_s": images_per_s,
        "step_time_s": step_s,
        "model_tflops_per_s": flops_per_s / 1e12,
    }
    figures |= run.timer.figures(step_s)
    if plan.peak_flops is not None:
        figures["mfu"] = flops_per_s / plan.peak_flops
    return figures


def _reads(state: TrainState) -> tuple[int, int]:
    """(unreadable samples, samples) that this rank has read in the life of the run."""
    return sum(state.holes.values()), state.samples_read


def _validate_sample_evaluate(run: Run, watchdog: Watchdog, record: dict[str, Any], due: set[str]) -> None:
    """Do what is due of the three, and write one line of metrics."""
    if "validate" in due:
        with watchdog.phase("validation"):
            record |= run.validate() | {"val_set": json_digest(run.meta["validation"])[:8]}
    if "sample" in due:
        with watchdog.phase("sampling"):
            run.sample(run.folder / "samples" / f"step_{record['step']:08d}.png")
    if "evaluate" in due:
        with watchdog.phase("evaluation"):
            record |= run.evaluate()
    run.metrics.write(record)
    if due & {"validate", "sample", "evaluate"}:
        run.metrics.plot()
