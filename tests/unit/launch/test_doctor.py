"""Each look of `mudit doctor` on machines that fall short of something, and what the command makes of it."""

import collections
import http.server
import json
import os
import resource
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest

from launch import doctor
from launch.machine import accelerators, services, system
from launch.machine.finding import GIB, Finding, looked_at
from trainer.errors import ConfigError

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t0-47\t0\t\tN/A
NIC0\tPXB\tSYS\tSYS\t X \t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a program on the path, in place of all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_pairs_without_nvlink() -> None:
    assert accelerators.slow_pairs(TOPOLOGY) == [(0, 2, "SYS"), (1, 2, "PHB")]
    assert accelerators.slow_pairs(TOPOLOGY.replace("SYS", "NV12").replace("PHB", "NV18")) == []


def test_nvlink(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert accelerators.nvlink().found == "nvidia-smi topo -m does not answer"
    tool("nvidia-smi", f'[ "$*" = "topo -m" ] && /bin/cat <<"END"\n{TOPOLOGY}END')
    finding = accelerators.nvlink()
    assert (finding.state, finding.found) == ("note", "not between GPUs 0-2 by SYS, 1-2 by PHB")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert accelerators.nvlink().state == "fine"


def test_torch_and_driver(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("version.cuda", None), ("version.hip", None), ("cuda.is_available", lambda: False)):
        monkeypatch.setattr(f"torch.{name}", value)
    assert accelerators.torch_and_driver().state == "fine"
    tool("nvidia-smi", "echo 580.65.06; echo 580.65.06")
    finding = accelerators.torch_and_driver()
    assert finding.state == "short"
    assert "for CPUs, driver 580.65.06: GPUs are here and this torch sees none" in finding.line()
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "this CUDA needs a newer driver" in accelerators.torch_and_driver().line()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert accelerators.torch_and_driver().state == "fine"
    monkeypatch.setattr("torch.__version__", "2.9.1+cu130")
    assert "expected 2.11 or newer" in accelerators.torch_and_driver().line()


def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "INFINIBAND", tmp_path / "sys")
    monkeypatch.setattr(accelerators, "VERBS", tmp_path / "dev")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libibverbs.so.1")
    assert accelerators.adapters().state == "note"
    for number, state in enumerate(("4: ACTIVE", "1: DOWN")):
        port = tmp_path / "sys" / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert accelerators.adapters()[::2] == ("short", f"1 of 2 active (400 Gb/sec (4X NDR)), {tmp_path}/dev is not here")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "uverbs0").touch()
    assert accelerators.adapters()[::2] == ("fine", "1 of 2 active (400 Gb/sec (4X NDR))")
    (tmp_path / "sys" / "mlx5_0" / "ports" / "1" / "state").write_text("1: DOWN\n")
    assert accelerators.adapters().state == "short"
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert "libibverbs1" in accelerators.adapters().remedy


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.python().state == "fine"
    monkeypatch.setattr("importlib.metadata.distributions", list)
    assert system.python().state == "short"
    assert "without torch, accelerate" in system.python().found


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total")
    for total, state in ((64 << 20, "short"), (16 * GIB, "fine")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, total=total: usage(total))
        assert system.shared_memory().state == state


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 8 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, hard[which]))
    monkeypatch.setattr(system, "INFINIBAND", tmp_path)
    assert "--ulimit nofile" in system.limits().remedy
    hard[resource.RLIMIT_NOFILE] = 65536
    assert system.limits()[::2] == ("fine", "65536 open files, 8 MiB may be locked")
    (tmp_path / "mlx5_0").mkdir()
    assert "memlock" in system.limits().remedy
    hard[resource.RLIMIT_MEMLOCK] = resource.RLIM_INFINITY
    assert system.limits().state == "fine"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder that will hold one that is not there yet; nothing is left behind."""
    monkeypatch.setattr(system, "TESTED", 4 << 20)
    monkeypatch.setattr(system, "SLOW_DISK", 0)
    monkeypatch.setattr(system, "LEAST_DISK", 0)
    assert system.disk(tmp_path / "a" / "b").found.startswith(f"{tmp_path}: ")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(system, "SLOW_DISK", 1e15)
    assert system.disk(tmp_path).state == "note"
    monkeypatch.setattr(system, "LEAST_DISK", 1e18)
    assert "make room" in system.disk(tmp_path).remedy

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "LEAST_DISK", 0)
    monkeypatch.setattr(os, "fsync", full)
    assert system.disk(tmp_path)[::2] == ("short", f"{tmp_path}: No space left on device")
    assert not list(tmp_path.iterdir())


def test_compiler(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert system.compiler().state == "short"
    tool("g++", "")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert "without Python.h" in system.compiler().found
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert system.compiler().state == "fine"


def test_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert services.encoders(None).state == "note"
    (tmp_path / "models--a--b").mkdir()
    assert services.encoders(None).found.startswith(f"a/b in {tmp_path}")
    named = {"autoencoder.path": (str(tmp_path), None), "objective.repa_encoder": ("none", None)}
    assert services.encoders(named)[::2] == ("fine", str(tmp_path))
    finding = services.encoders(named | {"text_encoder.path": ("someone/t5", "text_encoder_3")})
    assert finding[::2] == ("short", "not here: text_encoder.path someone/t5")


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in services.hub().found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        finding = services.hub()
        assert finding.state == "fine"
        assert finding.found.startswith("answers, with a token")
        assert "hf_" not in finding.line()
        server.shutdown()
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert services.hub()[::2] == ("note", "does not answer")


def test_slurm(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert services.slurm().found == "no sbatch"
    tool("sbatch", "")
    assert services.slurm().found == "sinfo does not answer"
    tool("sinfo", "echo 'gpu*: 4 x gpu:h100:8'; echo 'cpu: 2 x (null)'")
    assert services.slurm()[::2] == ("fine", "gpu*: 4 x gpu:h100:8, cpu: 2 x (null); this is job 77")


def test_a_look_that_fails_leaves_the_others() -> None:
    def broken() -> Finding:
        raise ValueError("of another kind")

    def missing() -> Finding:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    assert looked_at("disk", broken).line().endswith("could not be looked at (ValueError: of another kind)")
    assert looked_at("torch", missing)[:2] == ("short", "torch")


def doctored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *words])
    monkeypatch.setattr(system, "TESTED", 1 << 20)
    monkeypatch.setattr(system, "compiler", lambda: Finding("fine", "compilers", "all"))
    code = doctor.main()
    return code, capsys.readouterr().out


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = ("--folder", str(tmp_path))
    for name in ("shared_memory", "disk"):
        monkeypatch.setattr(system, name, lambda *_, name=name: Finding("fine", name, "so much"))
    code, said = doctored(monkeypatch, capsys, *folder)
    assert code == 0, said
    assert len(said.splitlines()) == 13
    monkeypatch.setattr(system, "limits", lambda: Finding("short", "ulimits", "3 open files", "raise it"))
    code, said = doctored(monkeypatch, capsys, *folder)
    assert code == 1
    assert "short  ulimits      3 open files: raise it" in said
    assert said.endswith("falls short: ulimits\n")
    code, said = doctored(monkeypatch, capsys, *folder, "--json", "--config", "mmdit_debug_mup")
    assert code == 1
    assert json.loads(said)["passed"] is False
    with pytest.raises(ConfigError):
        doctored(monkeypatch, capsys, "--config", "nowhere")
    with pytest.raises(SystemExit):
        doctored(monkeypatch, capsys, "optim.lr=1")
