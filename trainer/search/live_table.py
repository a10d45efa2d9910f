"""The live table of a search: what each trial does, and the best so far."""

import sys
import time
from collections import Counter

from rich.console import Group
from rich.live import Live
from rich.text import Text

from .space import as_overrides, at_the_ends
from .study import Study, Trial

REDRAW_S = 2.0
ROWS = 24  # of the table on a terminal


class Table:
    """On a terminal it is drawn anew while the block runs; elsewhere each change of a trial is one line."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._states = {trial.number: trial.state for trial in study.trials()}
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self._drawn_at = 0.0

    def __enter__(self) -> "Table":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.show(last=True)
        if self._live is not None:
            self._live.stop()

    def show(self, last: bool = False) -> None:
        """Draw what has changed, on a terminal at most every REDRAW_S seconds. last: the summary as well."""
        if self._live is None:
            for trial in self._study.trials():
                if self._states.get(trial.number) != trial.state:
                    self._states[trial.number] = trial.state
                    print(self._line(trial), flush=True)
            if last:
                print(self.summary(), flush=True)
        elif last or time.monotonic() - self._drawn_at > REDRAW_S:
            trials = [trial for trial in self._study.trials() if trial.state != "waiting"]
            shown = sorted(trials, key=lambda t: (t.state != "running", t.value is None, t.value))[:ROWS]
            rows = Text("\n".join(map(self._line, shown)), no_wrap=True, overflow="ellipsis")
            self._live.update(Group(rows, Text(self.summary())), refresh=True)
            self._drawn_at = time.monotonic()

    def summary(self) -> str:
        """How many trials are in which state, and the best one."""
        trials = self._study.trials()
        counts = Counter(trial.state for trial in trials)
        complete = [trial for trial in trials if trial.value is not None]
        text = f"{self._study.folder}: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        if complete:
            best = min(complete, key=lambda trial: trial.value or 0.0)
            text += (
                f"; best: trial {best.number}, val_loss_ema {best.value:.4g} at {' '.join(as_overrides(best.point))}"
            )
            text += "".join(f"\nwarning: {each}" for each in at_the_ends(self._study.search.space, best.point))
        elif set(counts) == {"diverged"}:
            text += "\nwarning: all trials diverged: lower the range of optim.lr, or lengthen optim.warmup_steps"
        return text

    def _line(self, trial: Trial) -> str:
        steps = self._study.proxy.train.steps
        step, loss = next(reversed(trial.curve.items()), (0, None))
        done = 10 if trial.state == "complete" else round(10 * step / steps)
        loss = loss if trial.value is None else trial.value
        figures = f"{'█' * done}{'░' * (10 - done)} {'' if loss is None else f'{loss:.4g}':>8}"
        return f"{trial.number:>4} {trial.state:<8} {figures}  {' '.join(as_overrides(trial.point))}  {trial.reason}"
