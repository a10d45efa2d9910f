"""All commands by one name: `mudit NAME ...` is `python launch/NAME.py ...`, and works from any directory.

mudit train --config mmdit_2b_mup.yaml [--gpus N] [section.key=value ...]

--gpus N starts so many processes on this machine, under torchrun with the signals and the time that the last save
needs; `mudit train` takes all GPUs that are seen, the other commands that can run on several take one. Under srun with
a task per GPU, or under torchrun, each process is one of theirs, and --gpus is refused. Without a GPU there is one
process unless --gpus says otherwise. Paths in configs and options are relative to the directory where you stand.
"""

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from launch.common import run
from launch.processes import importing
from trainer.config.yaml_files import nearest
from trainer.errors import ConfigError

_HERE = Path(__file__).resolve().parent
# Commands that run on several processes.
PARALLEL = ("train", "convert", "evaluate", "forecast", "precompute", "preflight", "sample", "search")


def main() -> NoReturn:
    """The program `mudit`: exit codes as every command's."""
    run(_dispatch)


def commands() -> dict[str, str]:
    """{name of a command: what it does, in a line}: each file of launch/ that is run by `run(main)`."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_HERE.glob("*.py"))}
    return {
        stem.replace("_", "-"): text.partition("\n")[0].strip('"')
        for stem, text in texts.items()
        if "\n    run(main)\n" in text
    }


def overview() -> str:
    """What `mudit --help` says."""
    width = shutil.get_terminal_size().columns
    lines = [
        textwrap.fill(does, width, initial_indent=f"  {name:12} ", subsequent_indent=" " * 15)
        for name, does in commands().items()
    ]
    return "\n".join([f"usage: mudit COMMAND ... (each has --help)\n\n{__doc__}", "commands:", *lines])


def command_of(words: Sequence[str], known: Collection[str]) -> tuple[str, list[str]]:
    """Name of the command that stands in front of its words, and these: `data report` is `data-report`."""
    name, others = words[0].replace("_", "-"), list(words[1:])
    if others and (joined := f"{name}-{others[0]}") in known:
        return joined, others[1:]
    return name, others


def _dispatch() -> int:
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help", "help"):
        print(overview())
        return 0
    known = commands()
    name, words = command_of(sys.argv[1:], known)
    if name not in known:
        raise ConfigError(f'mudit has no command "{name}"{nearest(name, list(known))} `mudit --help` lists them')
    stem = name.replace("-", "_")
    gpus, words = _take_gpus(words) if name in PARALLEL else (None, words)
    sys.argv = [f"mudit {name}", *words]
    command = importlib.import_module(f"launch.{stem}")
    if name in PARALLEL and (processes := _processes(name, gpus, command)) > 1:
        with importing():
            from launch.workers import run_workers

        return run_workers(_HERE / f"{stem}.py", words, processes)
    return command.main() or 0


def _take_gpus(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number of --gpus, None where it is not given, and all other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="mudit", usage="mudit COMMAND --gpus N")
    parser.add_argument("--gpus", type=int)
    taken, others = parser.parse_known_args(words)
    return taken.gpus, others


def _processes(name: str, gpus: int | None, command: object) -> int:
    """How many processes this command has to start, 1 where it is one of several itself. Raises ConfigError."""
    if "RANK" in os.environ:
        if gpus is not None:
            size = os.environ["WORLD_SIZE"]
            raise ConfigError(
                f"--gpus {gpus}: this is one of {size} processes of srun or torchrun already: leave it out"
            )
        return 1
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {gpus}")
    if {"-h", "--help"} & set(sys.argv) or (gpus is None and name != "train"):
        return 1
    if name == "train":
        command.read_config()  # pyright: ignore[reportAttributeAccessIssue] (a mistake is told before processes start)
    if not any(Path("/dev").glob(pattern) for pattern in ("nvidia[0-9]*", "kfd", "dxg")):
        return gpus or 1
    with importing():
        from launch.workers import gpus_seen

    seen = gpus_seen()
    if gpus is not None and gpus > seen > 0:
        raise ConfigError(f"--gpus {gpus}: expected at most {seen}, the GPUs that are seen (CUDA_VISIBLE_DEVICES)")
    return gpus or max(1, seen)


if __name__ == "__main__":
    main()
