"""Runs that were made elsewhere, as a table."""

import csv
import math
from pathlib import Path

from data.errors import DataError
from data.redaction import quote

from .fit import Rung

_COLUMNS = ("parameters", "images", "seed", "loss")
_MOST_ROWS = 100_000


def read_table(path: Path) -> list[Rung]:
    """A CSV file whose first line names the columns parameters, images, seed and loss; lr, a factor on the target's
    rate, may be a fifth, others are left out. A loss of nan, inf or nothing is a run that diverged. Raises DataError
    with the line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(f"{path} has no column {', '.join(missing)}; expected {', '.join(_COLUMNS)} in line 1")
            rungs = []
            for row in reader:
                if len(rungs) == _MOST_ROWS:
                    raise DataError(f"{path} has more than {_MOST_ROWS} rows")
                rungs.append(_rung(row, f"{path}, line {reader.line_num}"))
        if len({(each.parameters, each.images, each.seed, each.lr) for each in rungs}) < len(rungs):
            raise DataError(f"{path} has two rows of the same parameters, images, seed and lr")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}") from None
    return rungs


def _rung(row: dict[str, str], place: str) -> Rung:
    values = {}
    for name in (*_COLUMNS, "lr"):
        text = (row.get(name) or "").strip()
        default = {"lr": "1", "loss": "nan"}.get(name, "")
        try:
            values[name] = float(text or default)
        except ValueError:
            raise DataError(f"{place}: {name} {quote(text)} is no number") from None
    for name in ("parameters", "images", "lr"):
        if not 0 < values[name] < math.inf:
            raise DataError(f"{place}: {name} must be positive, got {values[name]:g}")
    if not values["seed"].is_integer():
        raise DataError(f"{place}: seed must be a whole number, got {values['seed']:g}")
    loss = values["loss"]
    if loss <= 0:
        raise DataError(f"{place}: loss must be positive, got {loss:g}")
    finite = loss if math.isfinite(loss) else math.inf
    return Rung(values["parameters"], values["images"], int(values["seed"]), finite, values["lr"])
