"""Learning-rate schedules: a factor on the base rate, never an absolute rate, so that muP's ratios stay."""

import math
from typing import Literal

from .config.schema import OptimConfig

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def base_lr(optim: OptimConfig, first_step: int, last_step: int, step: int) -> float:
    """Base rate of update `step` under a schedule from first_step to last_step; the optimizer multiplies it with each
    parameter's factor in the muP table."""
    steps = last_step - first_step
    return optim.lr * lr_factor(step - first_step, optim.schedule, optim.warmup_steps, optim.decay_steps, steps)


def lr_factor(step: int, schedule: Schedule, warmup_steps: int, decay_steps: int, total_steps: int) -> float:
    """Factor of update `step` (from 0): a linear warm-up, then the schedule.

    linear and cosine fall to 0 over the whole run, wsd (warm-up, stable, decay) over its last decay_steps steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match schedule:
        case "constant":
            return 1.0
        case "wsd":
            return min(1.0, (total_steps - step) / decay_steps)
        case "linear" | "cosine":
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
