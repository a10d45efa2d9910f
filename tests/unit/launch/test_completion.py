"""What a shell is offered after `mudit`, asked of bash itself."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import completion
from launch.mudit import commands
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mudit completion bash` prints."""
    path = tmp_path_factory.mktemp("shell") / "mudit.bash"
    path.write_text(said("bash"))
    return path


def said(shell: str) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["mudit completion", shell])
        assert completion.main() == 0
    return out.getvalue()


def offered(script: Path, *words: str) -> set[str]:
    """After these words, of which the last one is being written."""
    lines = [
        f"source {shlex.quote(str(script))}",
        f"COMP_WORDS=(mudit {' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words)}",
        "_mudit; printf '%s\\n' \"${COMPREPLY[@]}\"",
    ]
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_bash(script: Path) -> None:
    assert offered(script, "") == commands().keys()
    assert offered(script, "coo") == {"coord-check"}
    assert {"mmdit_debug_mup.yaml", "search/demo.yaml"} <= offered(script, "train", "--config", "")
    assert offered(script, "train", "--config", "mmdit_deb") == {"mmdit_debug_mup.yaml"}
    assert offered(script, "train", "--") == {"--config", "--gpus", "--help", "--help-config"}
    assert offered(script, "submit", "--no") == {"--nodes"}
    assert offered(script, "train", "optim.lr") == {"optim.lr="}
    assert {"model.width=", "train.steps=", "data.shards="} <= offered(script, "train", "--config", "a", "")
    assert {"run", "report", "transfer"} <= offered(script, "search", "")
    assert offered(script, "search", "report", "--st") == {"--study"}
    assert offered(script, "evaluate", "tab") == {"table"}
    assert offered(script, "evaluate", "table", "--ov") == {"--overwrite"}
    assert offered(script, "rate", "rep") == {"report"}
    assert offered(script, "rate", "report", "--js") == {"--json"}
    assert offered(script, "fetch", "data.shards", "=", "") == set(), "files, then"
    assert offered(script, "completion", "") == {"bash", "zsh", "fish"}


def test_each_command_within_one_is_known() -> None:
    """Those that a command looks for by itself stand in no list of argparse."""
    for name in commands():
        text = (ROOT / "launch" / f"{name.replace('-', '_')}.py").read_text()
        for part in re.findall(r'sys\.argv\[1:2\] == \["(\w+)"\]', text):
            assert part in completion.words_of(name).parts, f"{name} {part}"


def test_zsh_and_fish(script: Path) -> None:
    """Neither is here to be asked: the same function for zsh; for fish the same words."""
    assert said("zsh") == "autoload -Uz bashcompinit && bashcompinit\n" + script.read_text()
    lines = said("fish").splitlines()
    assert all(line.startswith(("complete -c mudit ", "set -g _mudit_keys ")) for line in lines)
    assert set(re.findall(r"-xa ([\w-]+) -d", "\n".join(lines))) == commands().keys()
    assert "complete -c mudit -n '__fish_seen_subcommand_from train' -l gpus" in lines
    assert "complete -c mudit -n '__fish_seen_subcommand_from evaluate' -a 'table'" in lines
    assert all(len(shlex.split(line.replace("\\'", ""))) > 5 for line in lines), "quotes are closed"
