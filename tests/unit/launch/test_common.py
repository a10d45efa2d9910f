"""What every command does with a user's mistake and with a disk that fails."""

import errno
from pathlib import Path

import pytest

from data.errors import DataError
from launch.common import run


def failing(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("data.shards: none"), "error: data.shards: none\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device: make room"),
        (
            OSError(errno.EACCES, "Permission denied", "out/x"),
            "error: out/x: Permission denied: make room or give rights",
        ),
    ],
)
def test_one_message_and_no_traceback(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: failing(error))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is: /dev/full."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: Path("/dev/full").write_text("x") and 0)
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run(lambda: failing(FileNotFoundError(errno.ENOENT, "No such file", "x")))
