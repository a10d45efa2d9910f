"""A coordinate check's verdict as JSON and as text."""

from typing import Any

from .slopes import CONTROL, FigureSlope, Judgement


def to_json(report: Judgement, control: FigureSlope | None, settings: dict[str, Any]) -> dict[str, Any]:
    """coord_check.json. control: the strongest row of the SP control."""

    def short(row: FigureSlope | None) -> dict[str, Any] | None:
        if row is None:
            return None
        return {"name": row.figure.name, "step": row.figure.step, "slope": row.slope, "note": row.note}

    rows = [{"run": "checked", **row.to_json()} for row in report.rows]
    rows += [{"run": "control", **row.to_json()} for row in report.control]
    return {
        "passed": report.verdict == "passed",
        "verdict": report.verdict,
        "reason": report.reason,
        "worst": {**{kind: short(row) for kind, row in report.worst.items()}, "control": short(control)},
        "culprits": {kind: [short(row) for row in found] for kind, found in report.culprits.items()},
        "settings": settings,
        "rows": rows,
    }


def describe(report: Judgement, control: FigureSlope | None, parametrization: str) -> str:
    """The verdict and the worst slope of each kind, for a terminal."""
    lines = [f"coordinate check of {parametrization}: {report.verdict.upper()}"]
    for kind, row in report.worst.items():
        slope = row.note if row.slope is None else f"{row.slope:+.2f} ± {row.error:.2f}"
        lines.append(f"  worst {kind:<10} slope {slope} (limit {row.limit})  {row.figure.name}, step {row.figure.step}")
        others = [r.figure.name for r in report.culprits[kind] if r is not row]
        if others:
            lines.append(f"    also over the limit: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}")
    if control is not None and control.slope is not None:
        lines.append(f"  SP control        slope {control.slope:+.2f} (must exceed {CONTROL})  {control.figure.name}")
    if report.verdict == "inconclusive":
        lines.append(f"  {report.reason}")
    return "\n".join(lines)
