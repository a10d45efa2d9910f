"""A real Slurm on this machine, for tests: munged, slurmctld and slurmd with their own ports, keys and folders.

Two nodes of pretended CPUs and GPUs, whose names do not resolve; no accounting. Needs root and Debian's slurmctld,
slurmd, slurm-client and munge.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
PARTITION = "debug"
NODES = ("mudit-node1", "mudit-node2")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
JobRequeue=1
KillWait=10
MessageTimeout=100
BatchStartTimeout=120
MinJobAge=600
ReturnToService=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=4000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=4000 Gres=gpu:8
PartitionName={partition} Nodes=ALL Default=YES MaxTime=01:00:00 State=UP OverSubscribe=FORCE:4
"""


def why_not() -> str | None:
    """What keeps Slurm from being started here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmctld and slurmd need root"


@dataclass(frozen=True)
class Slurm:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For every command that is to talk to this cluster; nothing of an outer job."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return outer | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Output of a command; an exit code other than 0 fails with what it said."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return {word.partition("=")[0]: word.partition("=")[2] for word in text.split() if "=" in word}

    def wait(self, number: int, *states: str, timeout_s: float = 300.0) -> dict[str, str]:
        """Until the job is in one of `states`. One that was requeued may start at once rather than in two minutes."""
        deadline = time.monotonic() + timeout_s
        requeued_at: float | None = None
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}: {self.logs()}"
            requeued = job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"
            requeued_at = (requeued_at or time.monotonic()) if requeued else None
            # Nothing is left to be told to end, and slurmd, which counts in seconds, would take a start in the second
            # of the requeue for the one that was revoked.
            settled = requeued_at is not None and time.monotonic() - requeued_at > 3
            if settled and not _has_steps(number) and _idle(self):
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.3)
        return job

    def gone(self, number: int, timeout_s: float = 300.0) -> bool:
        """Whether a job, or every task of an array, has ended within so many seconds."""
        deadline = time.monotonic() + timeout_s
        while self.run("squeue", "--noheader", f"--jobs={number}").strip():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        return True

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("slurm*.log")))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start a cluster whose files lie in `folder`; whatever happens, its jobs and daemons are gone afterwards."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    conf = _CONF.format(host=host, folder=folder, ports=_free_ports(3), nodes=NODES, partition=PARTITION)
    (folder / "slurm.conf").write_text(conf.lstrip())
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    slurm = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        with open(folder / f"{name}.out", "ab") as log:
            daemons.append(subprocess.Popen([name, *arguments], env=slurm.environment, stdout=log, stderr=log))

    try:
        start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log",
        )  # fmt: skip
        _until(lambda: (folder / "munge.socket").exists(), "munged")
        start("slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            (folder / "spool" / node).mkdir()
            start("slurmd", "-D", "-c", "-N", node, "-f", str(folder / "slurm.conf"))
        _until(lambda: _idle(slurm), "slurmd", slurm.logs)
        yield slurm
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, OSError):
            slurm.run("scancel", "--full", f"--partition={PARTITION}")
            _until(lambda: not slurm.run("squeue", "--noheader").strip(), "the last job's end")
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _has_steps(job: int) -> bool:
    """Whether what a job has started still runs. The report of its end would be taken for that of the next start."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                return True
    return False


def _idle(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=slurm.environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip() == "idle"


def _until(true: Callable[[], bool], what: str, logs: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}: {logs()}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
