"""The page of runs and studies: live, or as one file that holds its data, its pictures and plotly itself."""

import base64
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly

from data.errors import DataError
from data.templates import render

from ..files import json_text
from .panels import panels
from .run_data import read_sample

PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
_TEMPLATES = Path(__file__).with_name("templates")
_MOST_PICTURES, _MOST_PICTURE_BYTES = 60, 24 << 20  # of a run in a file


def page_data(sources: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> dict[str, Any]:
    """sources: of runs and studies, each with its number where that is not its place. notes: of them all. -> what the
    page draws."""
    sources = [{"number": number, **each} for number, each in enumerate(sources)]
    names = [each["name"] for each in sources]
    if len(set(names)) < len(names):  # as those of trunks
        above = os.path.commonpath([os.path.abspath(each["folder"]) for each in sources])
        sources = [{**each, "name": os.path.relpath(each["folder"], above)} for each in sources]
    keys = [key for each in sources if each["kind"] == "run" for key in each["curves"]]
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    return {"sources": list(sources), "notes": list(notes), "panels": panels(keys), "made": made}


def live_page(nonce: str) -> str:
    """The page that asks its server for the data. nonce: of its Content-Security-Policy."""
    return _render(nonce=nonce, policy=None, plotly=None, data="null")


def report_page(
    sources: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    study_reports: Mapping[int, str],
    page_notes: Sequence[str] = (),
) -> str:
    """The page as one file. folders: of the sources. study_reports: {number of a source: page of its study}."""
    held = [dict(each) for each in sources]
    for number, (each, folder) in enumerate(zip(held, folders, strict=True)):
        if each["kind"] == "run":
            each["samples"], each["pictures"], notes = _pictures(folder, each["samples"])
            each["notes"] = [*each["notes"], *notes]
        elif number in study_reports:
            each["report"] = study_reports[number]
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'"
    )
    data = json_text(page_data(held, page_notes))
    return _render(nonce="", policy=policy, plotly=PLOTLY.read_text(encoding="utf-8"), data=data)


def _pictures(folder: Path, samples: Sequence[Sequence[int]]) -> tuple[list[list[int]], dict[int, str], list[str]]:
    """(samples that are held, their pictures as addresses by step, what is to be said of it)."""
    kept = list(samples)
    if len(kept) > _MOST_PICTURES:
        last = len(kept) - 1
        kept = [kept[round(i * last / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    pictures: dict[int, str] = {}
    room = _MOST_PICTURE_BYTES
    for step, _ in reversed(kept):  # the newest first: they are what is looked at
        try:
            content = read_sample(folder, step)
        except (OSError, DataError):
            continue
        if (room := room - len(content)) < 0:
            break
        pictures[step] = "data:image/png;base64," + base64.b64encode(content).decode()
    held = [list(each) for each in kept if each[0] in pictures]
    notes = [f"{len(held)} of the {len(samples)} sample grids are in this file"] if len(held) < len(samples) else []
    return held, pictures, notes


def _render(nonce: str, policy: str | None, plotly: str | None, data: str) -> str:
    """Within a script nothing may look like its end, nor like a comment of HTML."""
    return render(
        _TEMPLATES / "page.html",
        nonce=nonce,
        policy=policy,
        plotly=None if plotly is None else _in_script(plotly),
        data=data.replace("<", "\\u003c"),
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=_in_script((_TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )


def _in_script(text: str) -> str:
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def plain(data: Any) -> bytes:
    """Page data as it goes over the wire."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
