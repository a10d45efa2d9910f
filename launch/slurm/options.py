"""Options of sbatch: written so that none becomes a second line or word, and what a job asks for by default."""

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from data.redaction import quote
from trainer.errors import ConfigError

CPUS_PER_GPU = 8

# Seconds of each field of a time limit, by their number; after days it always starts with hours.
_UNITS = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}


def option(name: str, value: object) -> str:
    """An option of sbatch with a value of one word, which Slurm takes apart as a shell does."""
    return f"--{name}={shlex.quote(str(value))}"


def literal(path: Path) -> str:
    """A path in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


def directives(options: Sequence[str]) -> str:
    """The lines of a script that give sbatch its options. Raises ConfigError where one is more than a line."""
    for each in options:
        if not each.startswith("-") or not each.isprintable():
            raise ConfigError(f"sbatch: {quote(each)} is no option; expected --NAME=VALUE on one line")
    return "\n".join(f"#SBATCH {each}" for each in options)


def check_time(limit: str, signal_s: int, what: str) -> None:
    """Raise ConfigError where a job would be told to save before it starts. limit: of the job, as sbatch takes it.
    signal_s: how long before the limit it is told, as `what` says."""
    if not 0 < signal_s <= 65535:
        raise ConfigError(f"{what} is {signal_s}, expected 1 to 65535 seconds")
    seconds = limit_s(limit)
    if seconds <= signal_s:
        raise ConfigError(
            f"--time {limit} is {seconds:.0f} s, and the job is told to save {signal_s} s before that ({what}): "
            "expected a longer time, or a shorter warning"
        )


def limit_s(text: str) -> float:
    """Seconds of a time limit: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; inf where it sets none. Raises
    ConfigError for any other text."""
    if text.upper() in ("-1", "INFINITE", "UNLIMITED"):
        return math.inf
    days, dash, clock = text.rpartition("-")
    fields = clock.split(":")
    units = _UNITS[3] if dash else _UNITS.get(len(fields), ())
    numbers = [*([days] if dash else []), *fields]
    if len(fields) > len(units) or not all(field.isascii() and field.isdigit() for field in numbers):
        raise ConfigError(f"--time {quote(text)}: expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    seconds = 86400 * int(days or 0) + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))
    return seconds or math.inf  # 0: no limit


def add_resources(parser: argparse.ArgumentParser, mem: str | None, mem_help: str) -> None:
    """Give a command the options that `resources` reads. mem: the default of --mem."""
    parser.add_argument(
        "--cpus-per-gpu",
        type=int,
        metavar="N",
        help=f"(default: {CPUS_PER_GPU}, and more where data.num_workers are more)",
    )
    parser.add_argument("--mem", default=mem, help=f"memory of each node, as sbatch takes it (default: {mem_help})")
    parser.add_argument(
        "--gres", metavar="NAME", help="ask for the GPUs as --gres=NAME:G, where a site wants that: gpu, gpu:h100"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch: --sbatch=--nice"
    )


def resources(a: argparse.Namespace, workers: int) -> list[str]:
    """sbatch's options for the GPUs, CPUs and memory of a node, and those of --sbatch, which win; Slurm's own default
    is one CPU per task. a: arguments with the options of `add_resources`. workers: data.num_workers."""
    if a.gpus_per_node < 0 or (a.cpus_per_gpu is not None and a.cpus_per_gpu < 1):
        raise ConfigError("--gpus-per-node must be at least 0, and --cpus-per-gpu at least 1")
    asked = []
    if a.gpus_per_node:
        asked.append(option("gres", f"{a.gres}:{a.gpus_per_node}") if a.gres else f"--gpus-per-node={a.gpus_per_node}")
    # Options of one kind exclude each other, such as --mem and --mem-per-cpu.
    if not any(each.startswith("--cpus-per") for each in a.sbatch):
        cpus = a.cpus_per_gpu or max(CPUS_PER_GPU, workers + 1)
        asked.append(f"--cpus-per-task={cpus * max(1, a.gpus_per_node)}")
    if a.mem and not any(each.startswith("--mem") for each in a.sbatch):
        asked.append(option("mem", a.mem))
    return [*asked, *a.sbatch]


def refusal(script: Path, said: str) -> ConfigError:
    """Why sbatch did not take a script."""
    less = "; where a node has less than is asked for: --cpus-per-gpu, --mem, --gpus-per-node, --gres"
    return ConfigError(f"sbatch refused {script}: {said.strip()}{less if 'onfiguration' in said else ''}")
