"""Every training command of the README fits the GPUs that it names, by its own estimate."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.estimate.cluster import Cluster
from trainer.estimate.report import estimate

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "launch/train.py" in line or "launch/submit.py" in line
]
MADE = {"runs/found.yaml": "mmdit_demo_mup.yaml"}  # by a command before it, from this target


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) == README.count("launch/train.py") + README.count("launch/submit.py") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_training_command_passes_its_estimate(line: str) -> None:
    words = shlex.split(line, comments=True)
    options = {word: following for word, following in itertools.pairwise(words) if word.startswith("--")}
    gpus = int(options.get("--nproc-per-node", 1))
    if "--nodes" in options:
        gpus = int(options["--nodes"]) * int(options["--gpus-per-node"])
    config = load_config(MADE.get(options["--config"], options["--config"]), [word for word in words if "=" in word])
    found = estimate(config, Cluster(gpus))
    place = "memory_cached_gib" if config.data.synthetic else "memory_gib"  # synthetic data need no encoder
    assert found[place]["fits"], "\n".join(found["advice"])
