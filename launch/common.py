"""What every command shares: its parser, the checkpoint that it opens, one message for a user's mistake.

A command starts as `run(main)`. main() parses and checks everything that needs no torch, and only then imports what it
runs: --help and a misspelt key answer at once.
"""

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from data.errors import DataError
from data.redaction import message, redact_logs_and_tracebacks
from launch.processes import allow_open_files, end_process, importing, quieten_imports
from launch.ranks import take_ranks
from trainer.config.yaml_files import refuse_duplicates
from trainer.errors import CheckpointError, CompileError, ConfigError, RunError

if TYPE_CHECKING:
    from trainer.build.inference import Inference
    from trainer.config.schema import TrainConfig
    from trainer.parallel.mesh import Ranks

# A command is started by its path, which puts launch/ first on the path of modules. There export.py would hide the room
# export/: it goes, and the root of the checkout comes last.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [*(entry for entry in sys.path if Path(entry or ".").resolve() != _HERE), str(_HERE.parent)]

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0 success, 1 a check falls short, 2 bad input, 141 nobody reads its output any more."""
    redact_logs_and_tracebacks()
    quieten_imports()
    allow_open_files()
    end_process(lambda: _code(main))


def _code(main: Callable[[], int | None]) -> int:
    try:
        take_ranks()
        return main() or 0
    except (ConfigError, DataError, CheckpointError, CompileError) as error:
        return _report(str(error), 2)
    except RunError as error:
        return _report(str(error), 1)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            remedy = "make room or give rights, then run the same command again"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = f"a process may have {allow_open_files()}: raise `ulimit -n`"
        else:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _report(f"{where}{error.strerror}: {remedy}", 2, alike=False)


def _report(text: str, code: int, alike: bool = True) -> int:
    """Print a message on stderr and return the code. alike: all ranks have much the same to say."""
    if alike and os.environ.get("RANK", "0") != "0":
        time.sleep(15)  # rank 0 nearly always says the same; torchrun ends this process before it would repeat it
    print(f"error: {message(text)}", file=sys.stderr, flush=True)
    return code


class Command(argparse.ArgumentParser):
    """Options, and `key=value` overrides that may stand anywhere between them."""

    key_value: str | None = None

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride] (the base has overloads for its namespace)
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """args: what follows the command's name, sys.argv's unless given. ConfigError where a key is given twice."""
        if self.key_value is not None:  # after all positional arguments, whose place it would take
            self.add_argument("overrides", nargs="*", metavar=self.key_value)
        arguments = self.parse_intermixed_args(args)
        refuse_duplicates(getattr(arguments, "overrides", ()))
        return arguments


def command(
    doc: str | None, *, config: bool = True, overrides: str | None = "section.key=value", name: str | None = None
) -> Command:
    """The parser of a command. doc: what --help says. config: whether it takes --config. overrides: how an override
    looks, None where there are none. name: of a command within a file ("run" of search.py)."""
    prog = name and f"{Path(sys.argv[0]).name} {name}"
    parser = Command(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.key_value = overrides
    if config:
        parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    return parser


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Give a command the option --overwrite, for `keep_files`."""
    parser.add_argument("--overwrite", action="store_true", help="write over what is at --output already")


def keep_files(overwrite: bool | None, *outputs: Path, folder: bool = False) -> None:
    """Raise ConfigError where an output is of the wrong kind, file or folder, or holds what may not be written over.
    overwrite: None for a command without that option."""
    remedy = "" if overwrite is None else ", or add --overwrite to write over it"
    for path in outputs:
        if path.exists() and path.is_dir() != folder:
            raise ConfigError(f"--output: {path} is a {'file' if folder else 'folder'}: choose another name")
        if not overwrite and path.exists() and not (folder and not any(path.iterdir())):
            raise ConfigError(f"--output: {path} exists already: choose another{remedy}")


class Opened(NamedTuple):
    """A checkpoint: its folder, its meta.json, and the config that it (or its stage) was trained with, overridden."""

    folder: Path
    meta: dict[str, Any]
    config: "TrainConfig"


def open_checkpoint(path: Path, overrides: Sequence[str] = (), ranks: "Ranks | None" = None) -> Opened:
    """path: a checkpoint, or a run folder, of which the newest is taken. ranks: of this command, which verify it
    together, so that each file is read once; None: this process alone. However the run was sharded, they share one copy
    of the weights. Raises CheckpointError and ConfigError."""
    from trainer.checkpoint.find import find_checkpoint
    from trainer.checkpoint.meta import read_meta
    from trainer.config.load import parse_trained

    folder = find_checkpoint(path, None if ranks is None else ranks.control)
    meta = read_meta(folder)
    return Opened(folder, meta, parse_trained(meta, f"the config of {folder}", ["parallel.shard=0", *overrides]))


@contextlib.contextmanager
def inference(path: Path, overrides: Sequence[str] = ()) -> "Iterator[tuple[Opened, Inference]]":
    """A checkpoint, as open_checkpoint says, with its EMA weights on this command's processes, for a block of code."""
    with importing():
        from trainer.build.inference import build_inference
        from trainer.config.resolve import resolve
        from trainer.parallel.mesh import open_ranks

    with open_ranks() as ranks:
        opened = open_checkpoint(path, overrides, ranks)
        world = ranks.world(resolve(opened.config, ranks.size).shard)
        yield opened, build_inference(opened.config, opened.folder, world)
