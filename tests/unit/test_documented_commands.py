"""Every command on every page: it exists with its parts and options, and its config and keys load."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.completion import Words, words_of
from launch.mudit import command_of, commands
from tests.helpers.paths import ROOT
from tests.unit.test_docs import PAGES
from trainer.config.load import load_config

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# By a step of the page before it, from this one.
MADE = {"runs/found.yaml": "mmdit_demo_mup.yaml", "vit_debug_mup.yaml": "dit_debug_mup.yaml"}
MISTAKE = "optim.lrr=1"  # on purpose: docs/performance.md times its answer
known = functools.cache(words_of)


def found(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and words of each `launch/NAME.py ...` and `mudit NAME ...`, in blocks and between backticks."""
    text = page.read_text()
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for line in lines:
        command = re.search(r"(?:\blaunch/(\w+)\.py|\bmudit ([a-z][\w-]*))(?:\s+(.*))?$", line)
        if command and MISTAKE not in line:
            words = shlex.split(command[3] or "", comments=True)
            name, others = command_of([command[1] or command[2], *words], commands())
            # Beside commands, pages name what stands for any, and files that commands share.
            if name in commands():
                yield name, others
            else:
                assert name == "NAME" or (ROOT / "launch" / f"{name}.py").is_file(), f"{page.name}: {line}"


def wrong(words: list[str], command: Words) -> list[str]:
    """The options, and the part in the first place, that the command does not know."""
    options = {word.strip("[]").partition("=")[0] for word in words if word.strip("[]").startswith("--")}
    part = [word for word in words[:1] if command.parts and re.fullmatch("[a-z]+", word)]
    return [*options - {*command.options, "--help"}, *(word for word in part if word not in command.parts)]


@pytest.mark.slow
def test_commands_on_pages_have_what_they_are_given() -> None:
    checked = [(page.name, name, words) for page in PAGES for name, words in found(page)]
    assert len(checked) > 100
    unknown = [(page, name, bad) for page, name, words in checked if (bad := wrong(words, known(name)))]
    assert not unknown


def test_configs_and_keys_of_commands_on_pages_load() -> None:
    checked = 0
    for page in PAGES:
        for name, words in found(page):
            config = words[words.index("--config") + 1] if "--config" in words else "NAME"
            if "NAME" not in config and name not in ("search", "init"):
                load_config(MADE.get(config, config), [word for word in words if re.match(r"[a-z0-9_.]+=", word)])
                checked += 1
    assert checked > 20
