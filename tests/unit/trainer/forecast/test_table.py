"""Runs made elsewhere: what a table may hold, and the line that is wrong."""

import math
from pathlib import Path

import pytest

from data.errors import DataError
from trainer.forecast.fit import Rung
from trainer.forecast.table import read_table


def table(folder: Path, text: str) -> Path:
    path = folder / "rungs.csv"
    path.write_text(text)
    return path


def test_columns_in_any_order(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "\ufeffseed,loss,name,images,parameters\n0,0.5,a,1e4,2e5\n1, 0.25 ,b,20000,2e5\n2,nan,,1e4,1\n3,,,1,1\n",
    )
    rungs = read_table(path)
    assert rungs[:2] == [Rung(2e5, 1e4, 0, 0.5), Rung(2e5, 2e4, 1, 0.25)]
    assert [rung.loss for rung in rungs[2:]] == [math.inf, math.inf]


def test_learning_rates(tmp_path: Path) -> None:
    path = table(tmp_path, "parameters,images,seed,loss,lr\n1,1,0,1,\n1,1,0,1,0.5\n")
    assert [rung.lr for rung in read_table(path)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no column parameters, images, seed, loss"),
        ("parameters,images,loss\n", "has no column seed"),
        ("parameters,images,seed,loss\n1,1,0,1\n1,x,0,1\n", "line 3: images 'x' is no number"),
        ("parameters,images,seed,loss\n1,1\n", "line 2: seed '' is no number"),
        ("parameters,images,seed,loss\n0,1,0,1\n", "parameters must be positive, got 0"),
        ("parameters,images,seed,loss\ninf,1,0,1\n", "parameters must be positive, got inf"),
        ("parameters,images,seed,loss\n1,1,0.5,1\n", "seed must be a whole number"),
        ("parameters,images,seed,loss\n1,1,0,-1\n", "loss must be positive"),
        ("parameters,images,seed,loss\n1,1,0,1\0\n", "."),
        ("parameters,images,seed,loss\n1,1,0,1\n1,1,1,1\n1,1,0,2\n", "two rows of the same parameters"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_table(table(tmp_path, text))


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "image.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError):
        read_table(tmp_path / "image.csv")
