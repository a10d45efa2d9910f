"""The report of a search as one page that needs no other file."""

import base64
from collections import Counter
from pathlib import Path

from data.templates import render

from ..files import write_atomically
from .report import StudyReport, describe_factors
from .space import as_overrides, at_the_ends

SHOWN_TRIALS = 10


def write_page(report: StudyReport) -> Path:
    """Write report/index.html in the study's folder; returns its path."""
    ranked = sorted(report.trials, key=lambda t: (t.value is None, t.value or 0.0, t.state == "waiting", t.number))
    text = render(
        Path(__file__).with_name("templates") / "report.html",
        r=report,
        c=report.study.proxy,
        counts=Counter(trial.state for trial in report.trials),
        best=as_overrides(report.best.point),
        ends=at_the_ends(report.study.search.space, report.best.point),
        factors=describe_factors(report),
        shown=ranked[:SHOWN_TRIALS],
        hidden=len(ranked) - len(ranked[:SHOWN_TRIALS]),
        png=inline_png,
        number=lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
    )
    path = report.study.folder / "report" / "index.html"
    write_atomically(path, text)
    return path


def inline_png(path: Path) -> str:
    """A picture as an address that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
