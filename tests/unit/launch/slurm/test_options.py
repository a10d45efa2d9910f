"""What a job asks Slurm for: its time limit and the warning before it."""

import math

import pytest

from launch.common import command
from launch.slurm.options import add_resources, check_time, limit_s, resources
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


def asked(*given: str, gpus: int = 4, workers: int = 2, mem: str | None = "0") -> list[str]:
    parser = command(None, config=False)
    add_resources(parser, mem, "")
    arguments = parser.parse_args([*given, f"run.gpus={gpus}"])
    arguments.gpus_per_node = gpus
    return resources(arguments, workers)


def test_a_node_is_asked_for_cpus_and_memory() -> None:
    assert asked() == ["--gpus-per-node=4", "--cpus-per-task=32", "--mem=0"]
    assert asked("--cpus-per-gpu", "12", "--mem", "500G") == ["--gpus-per-node=4", "--cpus-per-task=48", "--mem=500G"]
    assert asked("--gres", "gpu:h100") == ["--gres=gpu:h100:4", "--cpus-per-task=32", "--mem=0"]
    assert asked(workers=11) == ["--gpus-per-node=4", "--cpus-per-task=48", "--mem=0"], "a reader process each"
    assert asked(gpus=0, mem=None) == ["--cpus-per-task=8"]


def test_what_excludes_an_option_takes_its_place() -> None:
    own = ("--sbatch=--mem-per-cpu=4G", "--sbatch=--cpus-per-gpu=6")
    assert asked(*own) == ["--gpus-per-node=4", "--mem-per-cpu=4G", "--cpus-per-gpu=6"]
    for wrong in (["--cpus-per-gpu", "0"], ["--cpus-per-gpu=-1"]):
        with pytest.raises(ConfigError, match="--cpus-per-gpu at least 1"):
            asked(*wrong)
