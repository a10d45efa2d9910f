"""Rank and world of a process: what torchrun tells, or what srun tells where it starts the processes by itself."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from trainer.errors import ConfigError

# Where a launcher of MPI, of LSF or Flux says how many processes it has started.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")
# Where rank 0 listens: 20000 + (8 x job + step) modulo this, below the ports that Linux hands out by itself.
_PORTS = 12000


def take_ranks() -> None:
    """Set RANK, WORLD_SIZE and the other variables of torchrun where srun has started this process as one of several.

    A MASTER_ADDR or MASTER_PORT that is set stays. Raises ConfigError where another launcher has started several, or
    one of RANK and WORLD_SIZE is missing: each process would take itself for the only one.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 2:
        return
    if given:
        raise ConfigError(f"{given[0]} is set in the environment, expected RANK and WORLD_SIZE: unset it, or set both")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of this srun; SLURM_NTASKS may be those of a shell's job
    for name in _SIZES:
        # srun's PMI tells the same number as srun.
        if (size := os.environ.get(name, "1")) not in ("1", tasks):
            raise ConfigError(
                f"this is one of {size} processes ({name}) of a launcher that sets no RANK and WORLD_SIZE, and each "
                f"would run as the only one: start them with srun, or with torchrun --nproc-per-node N on each node"
            )
    if tasks != "1":
        os.environ |= _of_step(os.environ)


def _of_step(srun: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun. srun: its variables, as srun(1) explains them. Raises ConfigError where
    GPUs of the node would stay idle, or rank 0 cannot be found."""
    on_node = tasks_per_node(srun["SLURM_STEP_TASKS_PER_NODE"])[int(srun["SLURM_NODEID"])]
    if int(gpus := srun.get("SLURM_GPUS_ON_NODE", "0")) > on_node:
        raise ConfigError(
            f"srun has started {on_node} of the tasks on this node of {gpus} GPUs, and each takes one GPU: expected "
            f"--ntasks-per-node {gpus}"
        )
    # With --gpus-per-task each task sees its own GPU alone.
    own_gpu = "," not in srun.get("CUDA_VISIBLE_DEVICES", ",")
    port = 20000 + (8 * int(srun["SLURM_JOB_ID"]) + int(srun["SLURM_STEP_ID"])) % _PORTS
    return {
        "RANK": srun["SLURM_PROCID"],
        "WORLD_SIZE": srun["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if own_gpu else srun["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(on_node),
        "MASTER_ADDR": srun.get("MASTER_ADDR") or _address(srun),
        "MASTER_PORT": srun.get("MASTER_PORT") or str(port),
    }


def tasks_per_node(text: str) -> list[int]:
    """[8, 8, 2] of Slurm's "8(x2),2"."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def first_host(hosts: str) -> str:
    """The first name of Slurm's list of hosts, such as "rack[2-3]-node[01-04,9],login". A container has no scontrol to
    ask for it."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", hosts).partition(",")[0]


def _address(srun: Mapping[str, str]) -> str:
    """Where the step's first node, on which rank 0 runs, is reached: by its name, or else by the address that Slurm
    uses. Raises ConfigError where the name does not resolve, and Slurm cannot be asked."""
    if srun["SLURM_STEP_NUM_NODES"] == "1":
        return "localhost"
    name = first_host(srun["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    try:
        asked = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", name], capture_output=True, text=True, check=True, timeout=60
        )
        return re.findall(r"NodeAddr=(\S+)", asked.stdout)[0]
    except (OSError, subprocess.SubprocessError, LookupError):
        raise ConfigError(
            f"the name of this job's first node, {name}, does not resolve here, and scontrol cannot be asked for its "
            "address: export MASTER_ADDR=ADDRESS before srun"
        ) from None
