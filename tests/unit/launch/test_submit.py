"""The job that launch/submit.py writes, without a Slurm: options, settings, refusals, and when a job is requeued."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import submit
from launch.slurm import requeue
from tests.unit.trainer.forecast.test_track import data
from trainer.config.load import load_config
from trainer.errors import ConfigError

CLUSTER = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "01:00:00")


def submitted(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, config: str = "mmdit_debug_mup") -> int:
    command = ["submit.py", "--config", f"{config}.yaml", *CLUSTER, f"run.dir={folder}", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return submit.main()


def test_dry_run_prints_a_script_that_bash_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--account", "me", "--qos", "high", "--container", "registry/image:1", "--sbatch=--mem=0")
    assert submitted(monkeypatch, tmp_path, "--dry-run", "--mount", "/data", *more) == 0
    script = capsys.readouterr().out
    for option in ("nodes=2", "gpus-per-node=4", "account=me", "qos=high", "mem=0", "requeue", "signal=B:USR1@300"):
        assert f"#SBATCH --{option}\n" in script
    assert "export MUDIT_SRUN='--container-image=registry/image:1 --container-mounts=" in script
    here = Path.cwd()
    assert f",{tmp_path}:{tmp_path},/data:/data --container-workdir={here} --container-env=HF_HOME," in script
    assert f"export MUDIT_HOST_PYTHON={sys.executable}\n" in script
    assert 'exec "${MUDIT_HOST_PYTHON:-$MUDIT_PYTHON}"' in script
    assert script.count("--job-name") == 1  # the template's own options are gone
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_apptainer_and_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(monkeypatch, tmp_path, "--dry-run", "--apptainer", "image.sif", "--chain", "3") == 0
    script = capsys.readouterr().out
    assert "apptainer exec --nv" in script
    assert "#SBATCH --no-requeue\n" in script
    assert "export MUDIT_REQUEUE=0\n" in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.widht=64",), "model.widht: unknown key"),
        (("train.global_batch_size=4",), "8 processes need train.global_batch_size"),
        (("--container", "a", "--apptainer", "b"), "exclude each other"),
        (("--chain", "0"), "--chain"),
        (("--time", "4:00"), "--time 4:00 is 240 s.*300 s before"),
        (("--signal-seconds", "3600"), "--time 01:00:00 is 3600 s.*3600 s before"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        submitted(monkeypatch, tmp_path, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run.name='a\\ntouch hacked'",), ("run.name=../up",), ("run.name=-rf",), ("run.name='a b'",),
        ("--account", "me\ntouch hacked"), ("--qos", "a\n#SBATCH --uid=root"), ("--partition", "gpu\nid"),
        ("--time", "1:00\nid"), ("--sbatch", "id"), ("--sbatch=--mem=0\nid",), ("--container", "image\nid"),
        ("--apptainer", "a\nb"), ("--container", "image", "--mount", "/data\n"),
    ],
)  # fmt: skip
def test_nothing_given_becomes_a_line_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"expected") as error:
        submitted(monkeypatch, tmp_path, "--dry-run", *arguments)
    assert len(str(error.value).splitlines()) <= 2


def test_values_of_sbatch_are_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(monkeypatch, tmp_path / "50% here", "--dry-run", "--account", "a --uid=0 # b") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --account='a --uid=0 # b'\n" in script
    assert "/50%% here/mmdit_debug_mup/jobs/001/slurm-%j.out'\n" in script


@pytest.mark.parametrize("container", ["--container", "--apptainer"])
def test_a_folder_that_a_job_cannot_name_is_refused(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="runs, mine' holds a comma"):
        submitted(monkeypatch, tmp_path / "runs, mine", "--dry-run", container, "image")
    with pytest.raises(ConfigError, match=r"12:30/.* holds a colon, which no PYTHONPATH takes"):
        submitted(monkeypatch, tmp_path / "12:30", "--dry-run")


def test_no_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="login node"):
        submitted(monkeypatch, tmp_path)


def test_a_target_without_a_ladder_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(config: str) -> bool:
        submitted(monkeypatch, tmp_path, "--dry-run", config=config)
        return "launch/ladder.py" in capsys.readouterr().err

    monkeypatch.setattr(submit, "warn_of_slowness", lambda *_: None)  # seconds, of another test
    assert warned("mmdit_18b_mup")
    assert not warned("mmdit_0.18b_mup")  # the proxy is what a ladder stands on
    ladder = tmp_path / "mmdit_18b_mup_ladder" / "ladder.json"
    ladder.parent.mkdir()
    ladder.write_text(json.dumps({"passed": False}))
    assert warned("mmdit_18b_mup")
    ladder.write_text(json.dumps({"passed": True}))
    assert not warned("mmdit_18b_mup")


def test_only_a_state_of_this_start_counts(tmp_path: Path) -> None:
    """A start that dies at once must not be requeued because the one before it was preempted."""
    status = tmp_path / "status.json"
    assert requeue.state_since(status, 0.0) == (None, "")
    status.write_text('{"state": "preempted"}')
    written = status.stat().st_mtime
    assert requeue.state_since(status, int(written)) == ("preempted", "")
    assert requeue.state_since(status, written + 2) == (None, "")


@pytest.mark.parametrize("content", [b"", b'{"state": "preem', b"\0" * 50, b"[1]", b'{"state": "off"}', b"[" * 9999])
def test_a_damaged_state_counts_as_that_of_a_killed_run(content: bytes, tmp_path: Path) -> None:
    """Then the checkpoints of this start decide."""
    status = tmp_path / "status.json"
    status.write_bytes(content)
    assert requeue.state_since(status, 0.0) == ("running", f"{status} is damaged")


@pytest.mark.parametrize(
    ("state", "reason", "saved", "again"),
    [
        ("failed", "rank 3 is lost: killed, or its host is gone", True, True),
        ("failed", "rank 3 is lost: killed, or its host is gone", False, False),
        ("failed", "watchdog: step 9 took more than 40 s on rank 1", True, True),
        ("failed", "AcceleratorError: CUDA error: an illegal memory access was encountered", True, True),
        ("failed", "CUDA out of memory. Tried to allocate 2 GiB", True, False),
        ("failed", "12% of the samples were unreadable, more than data.max_bad_share", True, False),
        ("running", "", True, True),
        ("running", "", False, False),
        ("preempted", "asked to stop by a signal", False, True),
        ("finished", "", True, False),
    ],
)
def test_what_is_requeued(
    state: str, reason: str, saved: bool, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine has broken is tried again, as long as each start gets as far as a checkpoint."""
    run = tmp_path / "run"
    for step, exists in ((1, True), (2, saved)):
        meta = run / "checkpoints" / f"step_{step:08d}" / "meta.json"
        meta.parent.mkdir(parents=True)
        if exists:
            meta.write_text("{}")
    os.utime(run / "checkpoints/step_00000001/meta.json", (1, 1))  # of the start before
    (run / "status.json").write_text(json.dumps({"state": state, "step": 3, "reason": reason}))
    calls: list[Any] = []
    monkeypatch.setattr(
        requeue.subprocess, "run", lambda command, **_: calls.append(command) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("MUDIT_REQUEUE", raising=False)
    arguments = ["--config", "mmdit_debug_mup", "--since", "1000", "--exit-code", "1"]
    monkeypatch.setattr("sys.argv", ["requeue.py", *arguments, f"run.dir={tmp_path}", "run.name=run"])
    assert requeue.main() == (0 if again or state == "finished" else 1)
    assert calls == ([["scontrol", "requeue", "7"]] if again else [])


def test_a_large_model_without_a_forecast_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> str:
        submitted(monkeypatch, tmp_path, "--dry-run", "mup.base_width=32", *arguments)
        return capsys.readouterr().err

    assert "no forecast of its loss" not in told("model.width=64")
    assert "times the compute of the proxy, and no forecast of its loss" in told("model.width=256")
    folder = tmp_path / "mmdit_debug_mup"
    folder.mkdir()
    config = load_config("mmdit_debug_mup.yaml", [f"run.dir={tmp_path}", "mup.base_width=32", "model.width=256"])
    (folder / "forecast.json").write_text(json.dumps(data(config)))
    assert "no forecast" not in told("model.width=256")
    with pytest.raises(ConfigError, match="is the forecast of another run"):
        told("model.width=256", "optim.lr=0.5")
