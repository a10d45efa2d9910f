"""Event files of TensorBoard in the run folder. Written by tensorboard's records and messages alone, without its
writers (and torch's), which import tensorflow where it is installed and write from a thread of their own."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data.files import open_plain

from .tracker import Tracked

FOLDER = "tensorboard"


class TensorboardRun:
    """See Tracker. Each line is in the file when `log` returns."""

    def __init__(self, tracked: Tracked, step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        messages: Any = event_pb2  # whose classes are made when it is imported
        self._event = messages.Event
        folder = tracked.folder / FOLDER
        folder.mkdir(exist_ok=True)
        before = sorted(path.name for path in folder.glob("events.out.tfevents.*"))
        self.held = step if before else -1
        # Files are read in the order of their names: a second start in one second comes later as well.
        began = max([int(time.time()), *(int(name.split(".")[3]) + 1 for name in before[-1:])])
        self._file = open_plain(folder / f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}", "ab")
        self._records = RecordWriter(self._file)
        self._write(0, file_version="brain.Event:2")
        # A reader drops what files before this one hold from here on; a start from 0 validates at step 0 anew.
        self._write(step + 1 if step else 0, session_log={"status": "START"})
        text = "\n".join(f"    {key}: {value}" for key, value in tracked.config.items())  # Markdown: as it stands
        content = {"dtype": "DT_STRING", "string_val": [text.encode()]}
        text_plugin = {"plugin_data": {"plugin_name": "text"}}
        self._show(step, {"tag": "config", "metadata": text_plugin, "tensor": content})

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        numbers = {tag: float(value) for tag, value in figures.items() if isinstance(value, int | float)}
        self._show(step, *({"tag": tag, "simple_value": number} for tag, number in numbers.items()))

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            width, height = image.size
        png = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": path.read_bytes()}
        self._show(step, {"tag": name, "image": png})

    def finish(self) -> None:
        self._file.close()

    def _show(self, step: int, *values: Mapping[str, Any]) -> None:
        self._write(step, summary={"value": values})

    def _write(self, step: int, **what: Any) -> None:
        try:
            self._records.write(self._event(wall_time=time.time(), step=step, **what).SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise
