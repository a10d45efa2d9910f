"""metrics.jsonl and status.json: strict JSON when written, and no damage to them stops a run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fuzz import counted, fuzz
from trainer.files import json_text
from trainer.monitor.metrics import Metrics
from trainer.monitor.plots import plot_evaluation, plot_loss
from trainer.monitor.records import METRICS, STATES, read_metrics, read_status, write_status

LINES = [b'{"step": %d, "loss": 0.5, "val_loss": 1.5}\n' % step for step in range(6)]


def resumed(folder: Path, step: int) -> list[dict[str, Any]]:
    """The records after a run has resumed from `step` and logged one step more."""
    metrics = Metrics(folder, True, 100, step)
    metrics.write({"step": step + 1, "loss": 0.25})
    metrics.close()
    return read_metrics(folder)


@pytest.mark.parametrize(
    "damage",
    [
        b"garbled\n",
        b"\xff\xfe\n",
        b"\0" * 900 + b"\n",
        b'{"loss": 1}\n',
        b'{"step": "2"}\n',
        b"3\n",
        b"[" * 9999 + b"\n",
    ],
    ids=["text", "bytes", "zeros", "no step", "no number", "no object", "deep"],
)
def test_damaged_lines_are_kept_beside_and_the_run_resumes(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METRICS).write_bytes(b"".join([*LINES[:3], damage, *LINES[3:]]))
    assert [record["step"] for record in resumed(tmp_path, 4)] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / f"{METRICS}.damaged").read_bytes() == damage
    assert f"{METRICS}: 1 damaged lines are left out, and kept in" in capsys.readouterr().out
    assert b"".join(LINES[:5]) in (tmp_path / METRICS).read_bytes(), "what was whole stays as it is"


def test_zeros_before_a_line_do_not_cost_the_line(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(LINES[0] + b"\0" * 4096 + LINES[1])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_lines_past_the_checkpoint_are_cut_where_no_room_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written for it."""
    (tmp_path / METRICS).write_bytes(b"".join(LINES))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.monitor.metrics.write_atomically", full)
    assert [record["step"] for record in resumed(tmp_path, 2)] == [0, 1, 2, 3]


def test_what_is_not_finite_is_null_with_its_reason(tmp_path: Path) -> None:
    """So that every reader of JSON takes the file; ours gets the numbers back."""
    metrics = Metrics(tmp_path, True, 100, 0)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "val_loss": 1.0})
    metrics.close()
    strict = json.loads((tmp_path / METRICS).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {
        "step": 1, "loss": None, "grad_norm": None, "lr": None, "val_loss": 1.0,
        "not_finite": {"loss": "nan", "grad_norm": "inf", "lr": "-inf"},
    }  # fmt: skip
    [record] = read_metrics(tmp_path)
    assert math.isnan(record.pop("loss"))
    assert record == {"step": 1, "grad_norm": math.inf, "lr": -math.inf, "val_loss": 1.0}
    assert json_text({"a": [1.0, (math.nan,)], "b": {"c": math.inf}}) == '{"a": [1.0, [null]], "b": {"c": null}}'


PIECES = st.one_of(
    st.sampled_from(LINES), st.sampled_from([b"\0" * 20, b"\n", b'{"step": 2', b"{}"]), st.binary(max_size=40)
)


@given(pieces=st.lists(PIECES, max_size=8), step=st.integers(0, 6))
@fuzz(40)
def test_whatever_became_of_metrics_a_run_resumes(
    pieces: list[bytes], step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / METRICS).write_bytes(b"".join(pieces))
    with counted():
        records = resumed(folder, step)
    assert records[-1] == {"step": step + 1, "loss": 0.25}
    assert all(record["step"] <= step for record in records[:-1])


@pytest.mark.filterwarnings("ignore")  # of matplotlib, about numbers that have no logarithm
@given(values=st.lists(st.fixed_dictionaries({"step": st.integers(0, 9)}, optional={
    key: st.none() | st.booleans() | st.floats() | st.integers(0, 9) | st.text(max_size=3) | st.lists(st.floats())
    for key in ("loss", "val_loss", "val_set", "val_fid", "val_loss_ema_t0.1")
}), max_size=3))  # fmt: skip
@fuzz(4)
def test_whatever_is_in_a_line_it_is_plotted(
    values: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    plot_loss(values, folder / "loss.png")
    plot_evaluation(values, folder / "evaluation.png")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@given(content=st.binary(max_size=60) | st.sampled_from(STATES).map(lambda s: f'{{"state": "{s}", "step": 1'.encode()))
@fuzz(40)
def test_whatever_became_of_a_status_it_is_read_as_none(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "status.json").write_bytes(content)
    with counted():
        assert read_status(folder) is None
    write_status(folder, "failed", 3, "why")
    assert read_status(folder) == ("failed", "why")
