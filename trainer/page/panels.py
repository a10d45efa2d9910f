"""Which panels a page has: what stands together in one, by which name, in which unit."""

from collections.abc import Iterable
from typing import Any, NamedTuple

_LEVEL = "val_loss_ema_t"
_LIVE_LEVEL = "val_loss_t"
_TIME = "mup/loss_t"


class Line(NamedTuple):
    key: str
    label: str


class Panel(NamedTuple):
    """title, and unit of the vertical axis. factor: on the figures, as 100 for percent. log: whether the axis is
    logarithmic (where all figures are positive). ordered: whether the lines have an order, which their colours show.
    smooth: whether the page's smoothing is for it. note: a sentence on what is seen."""

    section: str
    title: str
    unit: str
    lines: list[Line]
    log: bool = False
    ordered: bool = False
    smooth: bool = False
    factor: float = 1.0
    note: str = ""
    band: bool = False


def panels(keys: Iterable[str]) -> list[dict[str, Any]]:
    """The panels of runs that have logged these keys, without the lines that none has. Every key is in one of them."""
    known = set(keys)
    found = [panel._replace(lines=[line for line in panel.lines if line.key in known]) for panel in _known(known)]
    shown = {line.key for panel in found for line in panel.lines} | {f"forecast/{name}" for name in _FORECAST}
    found += [Panel("More", key, "", [Line(key, key)]) for key in sorted(known - shown)]
    return [{**panel._asdict(), "lines": [line._asdict() for line in panel.lines]} for panel in found if panel.lines]


_FORECAST = ("loss", "low", "high")


def _known(keys: set[str]) -> list[Panel]:
    figures = sorted(key for key in keys if key.startswith("val_") and not key.startswith("val_loss"))
    return [
        Panel("Loss", "Loss", "mean per sample", [Line("loss", "training"), Line("val_loss", "validation"),
              Line("val_loss_ema", "validation, EMA")], log=True, smooth=True, band=True,
              note="Validation: the same images, times and noise each time. A gap: other samples from there on."),
        Panel("Loss", "Validation by noise level", "EMA weights", _numbered(keys, _LEVEL, "t = "), log=True,
              ordered=True, note="By time t of the flow: near 0 an image, near 1 noise."),
        Panel("Loss", "Training loss by time", "mean per sample", _numbered(keys, _TIME, "t = "), log=True,
              ordered=True, smooth=True, note="Of the times that were drawn in an eighth of [0, 1] each."),
        Panel("Loss", "REPA", "minus mean cosine", [Line("repa_loss", "training")], smooth=True),
        *(Panel("Loss", key.removeprefix("val_"), key, [Line(key, key.removeprefix("val_"))],
                note="Of images from the EMA weights.") for key in figures),
        Panel("Optimisation", "Learning rate", "base rate", [Line("lr", "lr")]),
        Panel("Optimisation", "Gradient norm", "norm before clipping", [Line("grad_norm", "norm")], log=True,
              smooth=True),
        Panel("Optimisation", "Clipped steps", "% of steps", [Line("mup/clip_share", "clipped")], factor=100,
              smooth=True),
        Panel("Speed", "Throughput", "images/s", [Line("images_per_s", "images/s")], smooth=True),
        Panel("Speed", "MFU", "% of the devices' peak", [Line("mfu", "MFU")], factor=100, smooth=True),
        Panel("More" if "mfu" in keys else "Speed", "Model FLOP/s", "TFLOP/s, all devices",
              [Line("model_tflops_per_s", "TFLOP/s")], smooth=True),
        Panel("Speed", "Ranks", "s per step", [Line("perf/step_max_s", "step"),
              Line("perf/forward_max_s", "forward, slowest"), Line("perf/forward_median_s", "forward, median"),
              Line("perf/data_wait_max_s", "wait for data, slowest"),
              Line("perf/data_wait_median_s", "wait for data, median")], log=True,
              note="Where the slowest rank lies far above the median, the others wait for it."),
        Panel("μP health by role", "Update to weight", "|update| / |weight|",
              _roles(keys, "update_to_weight"), log=True,
              note="Of the logged step. Under μP it keeps its size as the width grows."),
        Panel("μP health by role", "Weight norm", "norm", _roles(keys, "weight_norm"), log=True),
        Panel("μP health by role", "Tiny gradients", "% below 10 ε", _roles(keys, "tiny_gradient_share"), factor=100,
              note="Where Adam's ε shrinks the step."),
        Panel("Data", "Unreadable samples", "% of those read", [Line("bad_share", "holes")], factor=100),
        Panel("Data", "Skipped steps", "steps per log line", [Line("skipped_steps", "not finite"),
              Line("spike_steps", "spike")]),
        Panel("Data", "Data left out", "steps", [Line("jumped_steps", "after rollbacks")]),
        Panel("More", "Validation by noise level, live weights", "loss", _numbered(keys, _LIVE_LEVEL, "t = "),
              log=True, ordered=True),
        Panel("More", "Saves", "s", [Line("checkpoint_write_s", "written"),
              Line("checkpoint_blocked_s", "training waited")]),
        Panel("More", "Step time", "s per step", [Line("step_time_s", "mean"), Line("perf/step_median_s", "median")]),
    ]  # fmt: skip


def _numbered(keys: set[str], prefix: str, label: str) -> list[Line]:
    """Keys that go on as a number, by it."""
    found = [(float(rest), key) for key in keys if _is_number(rest := key.removeprefix(prefix)) and rest != key]
    return [Line(key, f"{label}{number:.2f}") for number, key in sorted(found)]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and text.isascii() and len(text) < 20


def _roles(keys: set[str], figure: str) -> list[Line]:
    found = sorted(key for key in keys if key.startswith("mup/") and key.endswith(f"/{figure}"))
    return [Line(key, key.removeprefix("mup/").removesuffix(f"/{figure}")) for key in found]
