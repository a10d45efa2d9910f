"""Elastic restart: of two torchrun agents one is killed with its worker; the other goes on alone, in the same order."""

import contextlib
import random
import re
import socket
from pathlib import Path

from tests.distributed.runs import assert_close, train
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.meta import read_meta
from trainer.monitor.metrics import read_metrics

from .harness import job, status

SETTINGS = (
    "train.steps=16", "train.log_every=2", "train.checkpoint_every=4", "train.validate_every=8", "train.sample_every=0",
    "parallel.precision=fp64",
)  # fmt: skip
START_S = 240.0


def free_port() -> int:
    """Below those that the system gives to connections: agents bind it seconds later."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(10_000, 20_000)))
            return probe.getsockname()[1]


def test_one_agent_goes_on_alone(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    common = (
        "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic",
    )  # fmt: skip
    # A dead agent is noticed after 4 x 2 s; a round with one agent waits 10 s for a second. The one that stays has the
    # store; both start at once, so that neither waits long for the other.
    conf = "last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=4,read_timeout=240,is_host={}"
    with (
        job(run, *SETTINGS, launcher=(*common, "--rdzv-conf", conf.format(0)),
            faults={"rank": None, "kill_torchrun": 9}) as dies,
        job(run, *SETTINGS, launcher=(*common, "--rdzv-conf", conf.format(1))) as stays,
    ):  # fmt: skip
        assert dies.wait(START_S) == -9
        assert stays.wait(START_S) == 0, stays.text()[-4000:]
    # Its worker lost the other one, or, where the other agent had the first rank, the store that both share.
    assert re.search("rank 0 is lost|rank 1 is lost|the rendezvous store is gone", stays.text())
    assert "resuming" in stays.text()
    assert status(run)["state"] == "finished"
    assert len(read_meta(find_checkpoint(run))["reads"]) == 1, "processes of the last checkpoint"
    assert_close(read_metrics(run), train(2, tmp_path / "whole", *SETTINGS), 1e-9)
