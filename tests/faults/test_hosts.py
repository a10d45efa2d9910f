"""Two hosts, network namespaces joined by a cable that is cut in mid-step: the job ends with a reason, and resumes."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.runs import exact, last_step, train
from trainer.monitor.metrics import read_metrics

from .harness import Job, job, status, wait_until

SETTINGS = (
    "train.steps=40", "train.log_every=2", "train.checkpoint_every=5", "train.validate_every=20",
    "train.sample_every=0",
)  # fmt: skip
START_S = 240.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Two namespaces; the first holds the rendezvous."""

    names: tuple[str, str]
    cables: tuple[str, str]
    addresses = ("10.213.7.1", "10.213.7.2")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def join(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cables[1], "up")

    @contextlib.contextmanager
    def torchruns(self, folder: Path, *settings: str) -> Iterator[list[Job]]:
        """The same command on both hosts."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._torchrun(host, folder, *settings)) for host in (0, 1)]

    def _torchrun(self, host: int, folder: Path, *settings: str) -> contextlib.AbstractContextManager[Job]:
        launcher = (
            "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "hosts",
            "--rdzv-endpoint", f"{self.addresses[0]}:29400", "--local-addr", self.addresses[host],
            "--rdzv-conf", f"is_host={int(host == 0)}",
        )  # fmt: skip
        return job(
            folder, *settings, launcher=launcher, prefix=("ip", "netns", "exec", self.names[host]),
            more_environment={"GLOO_SOCKET_IFNAME": self.cables[host]},
        )  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pid = os.getpid()  # other tests may run side by side
    hosts = Hosts((f"mudit-a-{pid}", f"mudit-b-{pid}"), (f"mua{pid}", f"mub{pid}"))
    try:
        try:
            for name in hosts.names:
                ip("netns", "add", name)
            ip("-n", hosts.names[0], "link", "add", hosts.cables[0], "type", "veth", "peer", hosts.cables[1])
            ip("-n", hosts.names[0], "link", "set", hosts.cables[1], "netns", hosts.names[1])
            for name, cable, address in zip(hosts.names, hosts.cables, hosts.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"no network namespaces here: {reason}")
        yield hosts
    finally:
        for name in hosts.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def test_a_cut_cable_ends_the_job_and_it_resumes(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watchful = ("train.watchdog_min_s=8", "train.watchdog_factor=3", *SETTINGS)
    with hosts.torchruns(run, *watchful) as (first, _):
        wait_until(lambda: last_step(run) >= 12, START_S, "step 12")
        hosts.cut()
        assert first.wait(90) == 1
        assert "watchdog: " in first.text()
    assert status(run)["state"] == "failed"
    assert status(run)["step"] < 40, "cut in mid-run"
    hosts.join()
    with hosts.torchruns(run, *watchful) as both:
        for each in both:
            assert each.wait(START_S) == 0, each.text()[-4000:]
    assert exact(read_metrics(run)) == exact(train(2, tmp_path / "whole", *SETTINGS))
