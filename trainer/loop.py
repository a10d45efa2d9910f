"""The training loop, top to bottom. Nothing in a step waits for the device; figures are read at log steps."""

from typing import Any

import torch
import torch.distributed as dist

from .errors import BadDataError, CheckpointError, RunError
from .monitor.mup_health import BINS, time_figures, time_sums
from .recovery.bad_data import OUTAGE, OutageDetector, bad_share_message, outage_message
from .recovery.skipped_ranges import data_step, follow
from .recovery.stop_signal import StopSignal
from .recovery.watchdog import Watchdog
from .rollback import go_back
from .run import Run
from .state import Totals, TrainState


def train(run: Run) -> str:
    """Train to the end; returns "finished" or "preempted". Raises RunError where the run cannot go on."""
    plan, state, metrics = run.plan, run.state, run.metrics
    if state.step >= run.last_step:
        metrics.say(f"{run.folder} has finished its {state.step} steps; nothing to do")
        metrics.status("finished", state.step)
        return "finished"
    metrics.status("running", state.step)
    lag = plan.log_every if run.world.device.type == "cuda" else 0
    watchdog = Watchdog(run.folder, run.world, plan.watchdog_factor, plan.watchdog_min_s, lag)
    with watchdog, StopSignal(run.world.control) as agreement:
        try:
            outcome, reason = _steps(run, agreement, watchdog)
        except (RunError, CheckpointError) as error:  # on all ranks
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
            # For rank 0 to have written: after a signal torchrun ends with an error, and Slurm then ends all nodes.
            dist.barrier(group=run.world.control)
    return outcome


def _steps(run: Run, agreement: StopSignal, watchdog: Watchdog) -> tuple[str, str]:
    """Steps until the last one, or until the ranks agree to stop; returns the outcome and its reason."""
    plan, state = run.plan, run.state
    if state.step == 0:
        _look(run, watchdog, {"step": 0, "samples_seen": 0}, validate=plan.validate_every > 0)
    stream = follow(run.batches, lambda: data_step(state.step, state.skipped_ranges))
    run.timer.restart()
    reads_before, losses = _reads(state), OutageDetector(plan.max_bad_share)
    while state.step < run.last_step:
        micro_batches = run.timer.take(stream)
        train_step(run, state.step, micro_batches)
        state.step += 1
        watchdog.beat(state.step)
        due = {key: _due(state.step, every, run.last_step) for key, every in _intervals(run).items()}
        holes, read = (now - then for now, then in zip(_reads(state), reads_before, strict=True))
        asked, holes, read = agreement.exchange(holes, read)
        if (lost := losses.lost_in_a_row(holes, read)) >= OUTAGE:
            raise BadDataError(outage_message(lost, state.holes))
        # Of what was read since this start, so that a run whose data were mended goes on; and of at least 1000: a few
        # bad samples in the first steps are no share yet.
        share = holes / max(1000, read)
        too_bad = due["log"] and share > plan.max_bad_share
        record: dict[str, Any] = {"step": state.step, "samples_seen": state.step * plan.global_batch_size}
        if due["log"]:
            record |= _figures(run) | {"bad_share": share}
            watchdog.beat(state.step, record["step_time_s"])
            row = state.spikes.take_longest_row()
            if plan.rollback_after and row >= plan.rollback_after:
                with watchdog.phase("going back"):
                    go_back(run, row)
                run.timer.restart()
                continue
        if due["log"] or due["validate"] or due["sample"] or due["evaluate"]:
            _look(run, watchdog, record, due["validate"], due["sample"], due["evaluate"])
        stopping = (asked and state.step < run.last_step) or too_bad
        last = stopping or state.step == run.last_step
        if due["snapshot"] or due["checkpoint"] or last:
            with watchdog.phase("saving"):
                if due["snapshot"]:  # before the checkpoint, which would have to be waited for longer
                    run.checkpointer.save_averages(state.step, run.ema.tensors(), {**run.meta, "step": state.step})
                if due["checkpoint"] or last:
                    save(run, wait=last)
        if too_bad:
            raise BadDataError(bad_share_message(state.step, share, plan.max_bad_share, state.holes))
        if stopping:
            return "preempted", "asked to stop by a signal"
        if any(due.values()):
            run.timer.restart()  # time spent looking is not training time
    return "finished", "" if run.last_step == plan.steps else "the data ended: rollbacks jumped over the rest of them"


def train_step(run: Run, step: int, micro_batches: list[Any]) -> None:
    """One update from this rank's micro-batches."""
    state, world = run.state, run.world
    # FSDP averages gradients over ranks, while the loss is a mean over the global batch: hence W / B.
    scale = world.size / run.plan.global_batch_size
    align = run.alignment
    run.timer.watching = logged = _due(step + 1, run.plan.log_every, run.last_step)
    # Sums: loss, REPA loss, text tokens, weight; loss and weight by time.
    sums = torch.zeros(4 + 2 * BINS, dtype=torch.float64, device=world.device)
    for number, batch in enumerate(micro_batches):
        encoded = run.encode(batch)
        draw = run.objective.draw(encoded.x0, encoded.keys)
        features_at = None if align is None else align.features_at
        prediction, projected = run.engine.model(draw.x_t, draw.t, encoded.condition, features_at=features_at)
        losses = run.objective.loss(prediction, draw)  # [b]
        total = loss = (encoded.weight * losses).sum()
        repa_loss = torch.zeros_like(loss)
        if align is not None:
            repa_loss = (encoded.weight * align.losses(projected, batch)).sum()
            total = loss + align.weight * repa_loss
        run.engine.backward(scale * total, last=number == len(micro_batches) - 1)
        scalars = (loss.detach(), repa_loss.detach(), encoded.text_tokens, encoded.weight.sum())
        scalars = torch.stack([scalar.double() for scalar in scalars])
        sums += torch.cat([scalars, time_sums(draw.t, losses.detach(), encoded.weight).flatten()])
        state.samples_read += batch.read
        for reason in batch.holes:
            state.holes[reason] = state.holes.get(reason, 0) + 1
    result = run.engine.step(run.lr(step), run.health if logged else None, state.spikes.limit())
    run.ema.update(step, result.skipped)
    state.spikes.update(result.grad_norm, result.skipped)
    # Summed over ranks in every step, a few numbers on the device, so that a checkpoint between two log lines holds
    # the same totals on all ranks and a resumed run logs the same figures.
    dist.all_reduce(sums)
    loss, repa_loss, text_tokens = sums[:3] / sums[3].clamp(min=1)
    norm, one = result.grad_norm.double(), torch.ones_like(loss)
    counts = (result.clipped.double(), one, 1 - one, 1 - one)
    taken = Totals(loss, repa_loss, norm, text_tokens, *counts, by_time=sums[4:]).packed()
    finite = norm.isfinite().double()
    left = Totals.unpacked(torch.zeros_like(taken))._replace(skipped=1 - finite, spikes=finite).packed()
    state.totals += torch.where(result.skipped > 0, left, taken)


def save(run: Run, wait: bool = False) -> None:
    """Start to write a checkpoint of the present step. wait: until it is complete, CheckpointError where it fails."""
    state = run.state
    tensors = {**run.ema.tensors(), **state.tensors()}
    reads: list[Any] = [None] * run.world.size
    dist.all_gather_object(reads, (state.holes, state.samples_read), group=run.world.control)
    meta = {**run.meta, "step": state.step, "reads": reads, "jumps": state.skipped_ranges}
    run.checkpointer.save(state.step, tensors, meta, wait)


def restore(state: TrainState, meta: dict[str, Any], rank: int) -> None:
    """Host-side state from a checkpoint, after its tensors; the counts of bad samples go on at rank 0 if the world
    has changed. The skipped_ranges are those of the run folder: it may have gone back to this checkpoint since."""
    state.step = meta["step"]
    if [list(skipped_range) for skipped_range in state.skipped_ranges if skipped_range.at_step <= state.step] != meta[
        "jumps"
    ]:
        state.spikes.forget_rows()
    reads = meta["reads"]
    if len(reads) == dist.get_world_size():
        state.holes, state.samples_read = dict(reads[rank][0]), reads[rank][1]
    elif rank == 0:
        state.samples_read = sum(read for _, read in reads)
        for holes, _ in reads:
            for reason, count in holes.items():
                state.holes[reason] = state.holes.get(reason, 0) + count


def _intervals(run: Run) -> dict[str, int]:
    plan = run.plan
    return {
        "log": plan.log_every,
        "validate": plan.validate_every,
        "checkpoint": plan.checkpoint_every,
        "snapshot": plan.snapshot_every,
        "sample": plan.sample_every,
        "evaluate": plan.evaluate_every,
    }


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the last one; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


def _figures(run: Run) -> dict[str, Any]:
    """Read the totals back (the host sync of a log step) and start them anew."""
    plan, state = run.plan, run.state
    totals = Totals.unpacked(state.totals.to("cpu", copy=True))
    step_s = run.timer.step_s()  # now that the device has done them
    state.totals.zero_()
    figures: dict[str, Any] = {
        "lr": run.lr(state.step - 1),
        "skipped_steps": int(totals.skipped),
        "spike_steps": int(totals.spikes),
    }
    if jumped := data_step(state.step, state.skipped_ranges) - state.step:
        figures["jumped_steps"] = jumped
    counted = float(totals.counted)
    if counted:
        for name in ("loss", "grad_norm", *(["repa_loss"] if run.alignment else [])):
            figures[name] = float(getattr(totals, name)) / counted
        figures["mup/clip_share"] = float(totals.clipped) / counted
    figures |= time_figures(totals.by_time.tolist()) | run.health.figures() | run.checkpointer.figures()
    text_tokens, buckets = float(totals.text_tokens) / max(1.0, counted), run.timer.buckets
    images_per_s = plan.global_batch_size / step_s
    image_flops = (
        sum(plan.image_flops(text_tokens, bucket) * count for bucket, count in buckets.items()) / buckets.total()
    )
    flops_per_s = image_flops * images_per_s
    figures |= {
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


def _look(
    run: Run, watchdog: Watchdog, record: dict[str, Any], validate: bool, sample: bool = False, evaluate: bool = False
) -> None:
    """Validate, sample and evaluate where due, and write one line of metrics."""
    if validate:
        with watchdog.phase("validation"):
            record |= run.validate()
    if sample:
        with watchdog.phase("sampling"):
            run.sample(run.folder / "samples" / f"step_{record['step']:08d}.png")
    if evaluate:
        with watchdog.phase("evaluation"):
            record |= run.evaluate()
    run.metrics.write(record)
    if validate or sample or evaluate:
        run.metrics.plot()
