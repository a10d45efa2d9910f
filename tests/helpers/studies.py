"""Studies for the tests whose losses are made up: nothing is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.search.definition import Search, parse_search
from trainer.search.space import Point
from trainer.search.study import Study

SPACE = {
    "optim.lr": {"log_uniform": [1e-4, 1e-1]},
    "optim.clip_norm": {"choices": [0.3, 1.0, 3.0]},
    "optim.betas": {"choices": [[0.9, 0.95], [0.9, 0.99]]},
    "optim.warmup_steps": {"uniform": [0, 9]},
}


def search(folder: Path, *overrides: str, **keys: Any) -> Search:
    """A search of the debug proxy, in a folder below `folder`."""
    data = {"config": "mmdit_debug_mup.yaml", "space": SPACE, "trials": 12, **keys}
    return parse_search(data, "test", "study", (f"run.dir={folder}", "train.validate_every=5", *overrides))


def fill(study: Study, loss: Callable[[Point], float | None]) -> None:
    """Run all trials with this loss; None diverges."""
    steps = study.proxy.train.steps
    while claim := study.claim():
        value = loss(claim.point)
        if value is None:
            claim.trial.report(0.001, 0)  # below every loss: it must not count as one
            study.finish(claim, "diverged", [], "loss is not finite at step 1")
            continue
        for step in range(0, steps + 1, 5):
            claim.trial.report(value + 1 - step / steps, step)
        study.finish(claim, "complete", [value], "", commit="abc", table="def", processes=1, device="cpu")
