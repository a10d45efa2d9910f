"""What every command does with its arguments, with a user's mistake and with a disk that fails; how it starts."""

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import DataError
from examples import coco_prompts
from launch import branch, convert, coord_check, evaluate, export, sample, search
from launch.common import command, keep_files, run
from tests.helpers.paths import ROOT
from trainer.errors import ConfigError


def failing(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("data.shards: none"), "error: data.shards: none\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device: make room"),
        (
            OSError(errno.EACCES, "Permission denied", "out/x"),
            "error: out/x: Permission denied: make room or give rights",
        ),
    ],
)
def test_one_message_and_no_traceback(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: failing(error))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)


def test_foreign_text_neither_steers_the_terminal_nor_tells_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    told = "shard \x1b]0;x\x07 of https://me:hunter2@host/a\u202e.tar"
    with pytest.raises(SystemExit):
        run(lambda: failing(DataError(told)))
    with pytest.raises(KeyError) as uncaught:
        run(lambda: failing(KeyError(told)))
    sys.excepthook(uncaught.type, uncaught.value, uncaught.tb)
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.LogRecord("data.any", logging.WARNING, "", 0, "%s", (told,), None))
    said = capsys.readouterr().err
    assert r"error: shard \x1b]0;x\x07 of https://***@host/a\u202e.tar" in said
    assert said.count("https://***@host/a") >= 3
    assert "hunter2" not in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is: /dev/full."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: Path("/dev/full").write_text("x") and 0)
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "said"), [((40, 90), "90"), ((30, 30), "error: Too many open files: a process may have 30")]
)
def test_open_files(limits: tuple[int, int], said: str) -> None:
    """A low soft limit is raised to what the user may have; beyond that there is one message."""
    code = (
        "import os, resource\nfrom launch.common import run\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
        "run(lambda: [os.pipe() for _ in range(20)] and print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout + done.stderr).startswith(said)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run(lambda: failing(FileNotFoundError(errno.ENOENT, "No such file", "x")))
    with pytest.raises(BrokenPipeError):  # of a socket, such as a peer's: the output is read
        run(lambda: failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--help"),  # written when the process ends
        ("mudit.py", "train", "--help-config"),  # longer than a buffer
        ("train.py", "--config", "nowhere"),  # a refusal whose message goes to the same pipe
    ],
)
def test_nobody_reads_the_output(words: tuple[str, ...]) -> None:
    """As after `| head`, once it has ended: quiet, with the code of a tool that SIGPIPE ends."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, f"launch/{words[0]}", *words[1:]]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    for errors in (subprocess.PIPE, writing):
        done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writing, stderr=errors, text=True, check=False)
        told = "nowhere" in words and errors != writing
        assert done.returncode == (2 if told else 141), done.stderr
        assert bool(done.stderr) == told
    os.close(writing)


# -------------------------------------------------------------------------------------------------- a user's files
@pytest.mark.parametrize(
    ("main", "arguments", "output", "there"),
    [
        (branch.main, "branch.py --checkpoint none", "out", "out/config.yaml"),
        (sample.main, "sample.py --checkpoint none --prompt a", "a.png", "a.png"),
        (coord_check.main, "coord_check.py --config mmdit_debug_mup", "out", "out/coord_check.json"),
        (coord_check.main, "coord_check.py --config mmdit_debug_mup", "out", "out/coord_check.png"),
        (convert.main, "convert.py --checkpoint none --engine zero", "out", "out/config.yaml"),
        (export.main, "export.py --checkpoint none", "out", "out/config.yaml"),
        (search.main, "search.py transfer --study none --to mmdit_debug_mup", "a.yaml", "a.yaml"),
        (evaluate.main, "evaluate.py table none", "out", "out/table.md"),
        (coco_prompts.main, "coco_prompts.py --annotations none --images none", "a.jsonl", "a.jsonl"),
    ],
)
def test_a_users_file_is_not_written_over(
    main: Callable[[], int],
    arguments: str,
    output: str,
    there: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is refused before anything is read."""
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    command = [*arguments.split(), "--output", str(tmp_path / output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ConfigError, match=f"{tmp_path / output}.* exists already: ") as refusal:
        main()
    with contextlib.suppress(SystemExit):
        sys.argv = [*arguments.split()[: 2 if " transfer" in arguments or " table" in arguments else 1], "--help"]
        main()
    assert ("--overwrite" in capsys.readouterr().out) == ("--overwrite" in str(refusal.value)), "the option exists"
    assert (tmp_path / there).read_text() == "mine"


def test_what_is_there_is_written_over_when_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    keep_files(False, tmp_path / "empty", tmp_path / "absent", folder=True)
    keep_files(True, tmp_path, folder=True)
    keep_files(True, tmp_path / "file", tmp_path / "absent")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file exists already: choose another, or add --overwrite"):
        keep_files(False, tmp_path / "absent", tmp_path / "file")
    with pytest.raises(ConfigError, match=f"{tmp_path} exists already"):
        keep_files(False, tmp_path, folder=True)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=f"{tmp_path}/empty is a folder: choose another name"):
            keep_files(overwrite, tmp_path / "empty")
        with pytest.raises(ConfigError, match=f"{tmp_path}/file is a file: choose another name"):
            keep_files(overwrite, tmp_path / "file", folder=True)


# ------------------------------------------------------------------------------------------------- the command line
def test_overrides_stand_anywhere() -> None:
    parser = command("Words.", name="words")
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args(["--fast", "runs/a", "x.y=1", "--config", "c", "z={a: 1}", "--count", "2", "w=-1"])
    assert (arguments.run, arguments.config, arguments.count, arguments.fast) == ("runs/a", "c", 2, True)
    assert arguments.overrides == ["x.y=1", "z={a: 1}", "w=-1"]


def test_a_key_is_given_once() -> None:
    given = ["--config", "c", "data.shards=a-000.tar", "optim.lr=1", "data.shards=a-001.tar"]  # from a-{000,001}.tar
    with pytest.raises(ConfigError, match=r"data\.shards is given.*(?s:.*)braces"):
        command("Words.").parse_args(given)


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command("Words.", config=False).parse_args(["a=1", "--nope", "b=2"])
    assert ended.value.code == 2
    assert "--nope" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the start
STARTS = """
import contextlib, io, json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv, said, code = arguments, io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    heavy = sorted({"torch", "numpy", "transformers", "diffusers", "optuna", "matplotlib"} & sys.modules.keys())
    print(json.dumps([code, heavy, said.getvalue()]))
"""
COMMANDS = ("train", "sample", "evaluate", "export", "estimate", "coord_check", "ladder", "convert", "fetch", "rate",
            "search", "submit")  # fmt: skip
CLUSTER = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1:0:0", "--dry-run")


def test_help_a_wrong_key_and_a_job_wait_for_no_torch(tmp_path: Path) -> None:
    """In one process: what one of them had imported, all after it would have."""
    config = ("--config", "mmdit_debug_mup.yaml")
    cases: list[tuple[int, str, tuple[str, ...]]] = [
        *((0, "usage: ", (f"launch/{name}.py", "--help")) for name in COMMANDS),
        *(
            (0, "usage: ", ("launch/search.py", name, "--help"))
            for name in ("run", "report", "horizon", "transfer", "cost")
        ),
        (2, 'optim.lrr: unknown key; did you mean "optim.lr"?', ("launch/train.py", *config, "optim.lrr=1")),
        (2, "train.step: unknown key", ("launch/train.py", "train.step=1", *config)),
        (2, "optim.lr is given", ("launch/train.py", "optim.lr=1", *config, "optim.lr=2")),
        (2, "model.widht: unknown key", ("launch/estimate.py", *config, "--gpus", "8", "model.widht=64")),
        (2, "trials is given", ("launch/search.py", "run", "--config", "search/demo.yaml", "trials=4", "trials=5")),
        (2, "model.widht: unknown key", ("launch/submit.py", *config, *CLUSTER, "model.widht=64")),
        (0, "#SBATCH --nodes=2", ("launch/submit.py", *config, *CLUSTER, f"run.dir={tmp_path}")),
    ]
    arguments = json.dumps([case for _, _, case in cases])
    done = subprocess.run([sys.executable, "-c", STARTS, arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (code, message, case), line in zip(cases, done.stdout.splitlines(), strict=True):
        ended, heavy, said = json.loads(line)
        assert (ended, heavy) == (code, []), case
        assert message in said, case
