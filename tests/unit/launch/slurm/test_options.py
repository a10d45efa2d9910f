"""What a job asks Slurm for: its time limit and the warning before it."""

import math

import pytest

from launch.slurm.options import check_time, limit_s
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("4:30", 270), ("00:04:00", 240), ("24:00:00", 86400), ("2-1", 176400), ("0-00:10", 600),
        ("1-02:03:04", 93784), ("0", math.inf), ("UNLIMITED", math.inf), ("infinite", math.inf), ("-1", math.inf),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_does(text: str, seconds: float) -> None:
    assert limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1d", "1:2:3:4", "1-2:3:4:5", "1-", "-5", "5m", "1.5", "1-2-3", "::", "١"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected minutes, MM:SS, HH:MM:SS"):
        limit_s(text)


def test_a_job_has_time_before_its_warning() -> None:
    with pytest.raises(ConfigError, match=r"--time 4:59 is 299 s.* 300 s before that \(--signal-seconds\)"):
        check_time("4:59", 300, "--signal-seconds")
    check_time("5:01", 300, "--signal-seconds")
    check_time("UNLIMITED", 300, "--signal-seconds")
    for signal_s in (0, -1, 65536):
        with pytest.raises(ConfigError, match=r"--signal-seconds is .*expected 1 to 65535"):
            check_time("10:00:00", signal_s, "--signal-seconds")
