"""metrics.jsonl (always), the terminal, trackers (when configured), loss.png and evaluation.png.

Names carry their units.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from data.files import open_plain
from data.redaction import message

from ..files import write_atomically
from .plots import plot_evaluation, plot_loss
from .records import METRICS, STATUS, metrics_line, read_lines, read_metrics, write_status
from .tracking.tracker import Tracked
from .tracking.trackers import Trackers
from .tracking.wandb_run import withdraw

# Dense bf16 FLOP/s of a device without sparsity, by a part of its name (vendors' data sheets).
_PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800 PCIe": 756e12,
    "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
}  # fmt: skip
PLOT_S = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PRINTED = ("loss", "val_loss", "val_loss_ema", "val_fid", "val_kid")


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device, or None if it is not known."""
    return next((flops for part, flops in _PEAK_FLOPS.items() if part in device_name), None)


class Metrics:
    """Rank 0 writes; other ranks hold one that does nothing, so that the loop has no `if rank`."""

    def __init__(self, folder: Path, active: bool, total_steps: int, first_step: int) -> None:
        """first_step: the step that is resumed from; later lines are cut (0 starts an empty file)."""
        self._folder = folder
        self._active = active
        self._total = total_steps
        self._first = first_step
        self._began = self._plotted = time.monotonic()
        self._trackers: Trackers | None = None
        self.band: Sequence[tuple[int, float, float, float]] = ()
        """What is forecast, for loss.png: (step, loss, low, high)."""
        if not active:
            return
        self._file = self._open()
        self._unwritten = b""
        self.cut(first_step)

    def cut(self, step: int) -> None:
        """Drop the lines past `step`, from which the run goes on."""
        if not self._active:
            return
        self._flush()
        self._file.close()
        if self._trackers is not None:
            self._trackers.finish()
        lines, path = read_lines(self._folder), self._folder / METRICS
        if any(line.record is not None and (not step or line.record["step"] > step) for line in lines):
            self._withdraw(step)  # first: killed in between, the next start still knows
        if damaged := [line.raw for line in lines if line.record is None]:
            self._keep_aside(damaged)
        kept = b"".join(line.raw for line in lines if step and line.record is not None and line.record["step"] <= step)
        if path.is_file() and path.read_bytes().startswith(kept):
            os.truncate(path, len(kept))  # on a full disk too
        else:
            write_atomically(path, kept)
        self._file, self._unwritten = self._open(), b""
        if self._trackers is not None:
            self._trackers.begin(step, self.records())

    def _withdraw(self, step: int) -> None:
        """From wandb, which cannot take back steps past this one."""
        if sent := withdraw(self._folder):
            self.say(
                f"warning: wandb run {sent} holds steps past {step}, which are taken back: the run goes on as a new "
                "one there, with the steps up to it; delete the old one"
            )

    def records(self) -> list[dict[str, Any]]:
        """What the file has logged so far; [] on other ranks than 0."""
        return read_metrics(self._folder) if self._active else []

    def _keep_aside(self, damaged: list[bytes]) -> None:
        aside = self._folder / f"{METRICS}.damaged"
        self.say(f"warning: {self._folder / METRICS}: {len(damaged)} damaged lines are left out, and kept in {aside}")
        with self.without_room(aside), open_plain(aside, "ab") as file:
            file.writelines(damaged)

    def _open(self) -> FileIO:
        return open_plain(self._folder / METRICS, "ab", buffering=0)

    def start_trackers(self, kinds: Sequence[str], tracked: Tracked) -> None:
        """Log to trackers as well: see tracking.tracker for what becomes of them when a run is resumed."""
        if self._active and kinds:
            self._trackers = Trackers(kinds, tracked, self.say)
            self._trackers.begin(self._first, self.records())

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show trackers a picture that the run folder holds."""
        if self._trackers is not None and path.is_file():
            self._trackers.picture(step, name, path)

    def write(self, record: Mapping[str, Any]) -> None:
        """One JSON object per line, flushed; then the terminal and trackers."""
        if not self._active:
            return
        self._unwritten += metrics_line(record)
        self._flush()
        self._print(record)
        if self._trackers is not None:
            self._trackers.log(record)

    def _flush(self) -> None:
        """A full disk does not end the run: a checkpoint that did not fit may be removed again in a moment."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            lines = self._unwritten.count(b"\n")
            self.say(f"warning: {self._folder / METRICS}: {error.strerror}; {lines} lines wait for room")

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self._active:
            print(message(text), flush=True)

    def status(self, state: str, step: int, reason: str = "") -> None:
        if self._active:
            with self.without_room(self._folder / STATUS):
                write_status(self._folder, state, step, message(reason))

    def plot(self, last: bool = False) -> None:
        """loss.png, and what was measured of the EMA weights as evaluation.png, from metrics.jsonl; at most once in
        PLOT_S but for the last time, because all ranks wait for it."""
        if self._active and (last or time.monotonic() - self._plotted > PLOT_S):
            self._plotted = time.monotonic()
            with self.without_room(self._folder / "loss.png"):
                records = read_metrics(self._folder)
                plot_loss(records, self._folder / "loss.png", self.band)
                plot_evaluation(records, self._folder / "evaluation.png")

    @contextlib.contextmanager
    def without_room(self, path: Path) -> Iterator[None]:
        """A full disk does not end the run: what can be written anew is left out, with a warning."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.say(f"warning: {path} is not written: {error.strerror}")

    def close(self) -> None:
        if self._active:
            self._flush()
            self._file.close()
        if self._trackers is not None:
            self._trackers.finish()

    def _print(self, record: Mapping[str, Any]) -> None:
        """One line per log step. Not by rich's progress: outside a terminal (torchrun's redirected output, Slurm's log
        files) it prints nothing until it ends, and every line here must stay in the log with its own figures."""
        step = record["step"]
        done = step / self._total
        width = 20 if sys.stdout.isatty() else 10
        bar = "█" * int(done * width) + "░" * (width - int(done * width))
        parts = [f"{bar} {step}/{self._total}"]
        parts += [f"{key} {record[key]:.4f}" for key in _PRINTED if key in record]
        if "grad_norm" in record:
            parts += [f"|g| {record['grad_norm']:.3g}", f"lr {record['lr']:.3g}"]
        if "images_per_s" in record:
            parts.append(f"{record['images_per_s']:.3g} images/s")
        if skipped := record.get("skipped_steps", 0) + record.get("spike_steps", 0):
            parts.append(f"{skipped} skipped")
        if step > self._first:
            left = (time.monotonic() - self._began) / (step - self._first) * (self._total - step)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        self.say("  ".join(parts))
