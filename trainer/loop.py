"""The training loop, top to bottom. Nothing in a step waits for the device; figures are read at log steps."""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .health import BINS, time_figures, time_sums
from .state import Run, TrainState


class BadDataError(RuntimeError):
    """More samples were unreadable than data.max_bad_share allows; the run has been saved."""


class StopRequest:
    """SIGTERM or SIGUSR1 asks for a checkpoint and an orderly end; ranks agree at the next log step."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(run: Run) -> str:
    """Train to the end; returns "finished" or "preempted". Raises BadDataError where too many samples are bad."""
    plan, state, metrics = run.plan, run.state, run.metrics
    if state.step >= plan.steps:
        metrics.say(f"{run.folder} has finished its {plan.steps} steps; nothing to do")
        metrics.status("finished", state.step)
        return "finished"
    stop = StopRequest()
    outcome, too_bad, share = "finished", False, 0.0
    metrics.status("running", state.step)
    try:
        if state.step == 0:
            _look(run, {"step": 0, "samples_seen": 0}, validate=plan.validate_every > 0, sample=False)
        began, begun_step = time.perf_counter(), state.step
        reads_before = _reads(state)
        for step, micro_batches in run.batches(state.step):
            train_step(run, step, micro_batches)
            state.step = step + 1
            due = {key: _due(state.step, every, plan.steps) for key, every in _intervals(run).items()}
            record: dict[str, Any] = {"step": state.step, "samples_seen": state.step * plan.global_batch_size}
            share = 0.0
            if due["log"]:
                record |= _figures(run, time.perf_counter() - began, state.step - begun_step)
                stopping, share = _agree(run, stop.asked, reads_before)
                record["bad_share"] = share
                outcome = "preempted" if stopping and state.step < plan.steps else "finished"
            too_bad = share > plan.max_bad_share
            if due["log"] or due["validate"] or due["sample"]:
                _look(run, record, due["validate"], due["sample"])
            ending = outcome == "preempted" or too_bad
            last = ending or state.step == plan.steps
            if due["snapshot"]:  # before the checkpoint, which would have to be waited for longer
                run.checkpointer.save_averages(state.step, run.ema.tensors(), {**run.meta, "step": state.step})
            if due["checkpoint"] or last:
                save(run, wait=last)
            if ending:
                break
            if any(due.values()):
                began, begun_step = time.perf_counter(), state.step  # time spent looking is not training time
            if state.step >= plan.steps:
                break
        metrics.plot()
        if too_bad:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(state.holes.items()))
            raise BadDataError(
                f"{share:.2%} of the samples were unreadable, more than data.max_bad_share {plan.max_bad_share:.2%} "
                f"(rank 0 saw {reasons or 'none of them'}). The run is saved at step {state.step}: make the samples "
                "readable again, or raise data.max_bad_share, and start it again."
            )
        metrics.status(outcome, state.step, "asked to stop by a signal" if outcome == "preempted" else "")
        return outcome
    except BaseException as error:
        run.checkpointer.wait()  # what is on its way is worth keeping
        metrics.status("failed", state.step, f"{type(error).__name__}: {error}")
        raise
    finally:
        stop.restore()


def train_step(run: Run, step: int, micro_batches: list[Any]) -> None:
    """One update from this rank's micro-batches."""
    state, world = run.state, run.world
    # FSDP averages gradients over ranks, while the loss is a mean over the global batch: hence W / B.
    scale = world.size / run.plan.global_batch_size
    # Sums: loss, text tokens, weight; loss and weight by time.
    total = torch.zeros(3 + 2 * BINS, dtype=torch.float64, device=world.device)
    for number, batch in enumerate(micro_batches):
        encoded = run.encode(batch)
        draw = run.objective.draw(encoded.x0, encoded.keys)
        prediction, _ = run.engine.model(draw.x_t, draw.t, encoded.condition)
        losses = run.objective.loss(prediction, draw)  # [b]
        loss = (encoded.weight * losses).sum()
        run.engine.backward(scale * loss, last=number == len(micro_batches) - 1)
        sums = torch.stack([loss.detach().double(), encoded.text_tokens.double(), encoded.weight.sum().double()])
        total += torch.cat([sums, time_sums(draw.t, losses.detach(), encoded.weight).flatten()])
        state.samples_read += batch.read
        for reason in batch.holes:
            state.holes[reason] = state.holes.get(reason, 0) + 1
    watch = run.health if _due(step + 1, run.plan.log_every, run.plan.steps) else None
    result = run.engine.step(run.lr(step), watch)
    run.ema.update(step, result.skipped)
    # Summed over ranks in every step, a few numbers on the device, so that a checkpoint between two log lines holds
    # the same totals on all ranks and a resumed run logs the same figures.
    dist.all_reduce(total)
    loss, text_tokens = total[:2] / total[2].clamp(min=1)
    clipped, one = result.clipped.double(), torch.ones_like(loss)
    figures = torch.cat([torch.stack([loss, result.grad_norm.double(), text_tokens, clipped, one, 1 - one]), total[3:]])
    state.totals += torch.where(result.skipped > 0, torch.zeros_like(figures), figures)
    state.totals[5] += result.skipped


def save(run: Run, wait: bool = False) -> None:
    """Start to write a checkpoint of the present step. wait: until it is complete, CheckpointError where it fails."""
    state = run.state
    tensors = {**run.ema.tensors(), "totals": state.totals}
    reads: list[Any] = [None] * run.world.size
    dist.all_gather_object(reads, (state.holes, state.samples_read), group=run.world.control)
    meta = {**run.meta, "step": state.step, "reads": reads}
    run.checkpointer.save(state.step, tensors, meta, wait)


def restore(state: TrainState, meta: dict[str, Any], rank: int) -> None:
    """Host-side state from a checkpoint; the counts of bad samples go on at rank 0 if the world has changed."""
    state.step = meta["step"]
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
    }


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the last one; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


def _figures(run: Run, seconds: float, steps: int) -> dict[str, Any]:
    """Read the totals back (the host sync of a log step) and start them anew."""
    plan, totals = run.plan, run.state.totals
    loss, grad_norm, text_tokens, clipped, counted, skipped, *by_time = totals.tolist()
    totals.zero_()
    figures: dict[str, Any] = {"lr": run.lr(run.state.step - 1), "skipped_steps": int(skipped)}
    if counted:
        figures |= {"loss": loss / counted, "grad_norm": grad_norm / counted, "mup/clip_share": clipped / counted}
    figures |= time_figures(by_time) | run.health.figures() | run.checkpointer.figures()
    images_per_s = plan.global_batch_size * steps / seconds
    flops_per_s = plan.image_flops(text_tokens / max(1.0, counted)) * images_per_s
    figures |= {
        "images_per_s": images_per_s,
        "step_time_s": seconds / steps,
        "model_tflops_per_s": flops_per_s / 1e12,
    }
    if plan.peak_flops is not None:
        figures["mfu"] = flops_per_s / plan.peak_flops
    return figures


def _reads(state: TrainState) -> tuple[int, int]:
    """(unreadable samples, samples) that this rank has read in the life of the run."""
    return sum(state.holes.values()), state.samples_read


def _agree(run: Run, asked: bool, before: tuple[int, int]) -> tuple[bool, float]:
    """(any rank was asked to stop, share of unreadable samples over all ranks), on the control group.

    The share is of what was read since this start (`before`), so that a run whose data were mended goes on.
    """
    holes, read = (now - then for now, then in zip(_reads(run.state), before, strict=True))
    numbers = torch.tensor([int(asked), holes, read])
    dist.all_reduce(numbers, group=run.world.control)
    stopping, holes, read = numbers.tolist()
    # Of at least 1000: a few bad samples in the first steps of a run are no share yet.
    return stopping > 0, holes / max(1000, read)


def _look(run: Run, record: dict[str, Any], validate: bool, sample: bool) -> None:
    """Validate and sample where due, and write one line of metrics."""
    if validate:
        record |= run.validate()
    if sample:
        run.sample(run.folder / "samples" / f"step_{record['step']:08d}.png")
    run.metrics.write(record)
    if validate or sample:
        run.metrics.plot()
