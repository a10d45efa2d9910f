"""docker/Dockerfile's own lines, run in an empty folder and a fresh environment: what it copies, and every RUN.

The environment stands for the base image: it has a torch with CUDA (a stand-in of two lines, which pip must leave
alone), and the packages of ours behind it: pip must find there all that pyproject.toml asks for, and has no index
to go to.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
IMPORT = "import sys, models.configs, data.config, trainer.config.load as c; print(c.__file__)"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(COPY or RUN, its arguments without options of docker's) in order, lines with a backslash joined."""
    joined = dockerfile.replace("\\\n", " ")
    return [(word, re.sub(r"^\s*(--\S+\s+)*", "", rest)) for word, rest in re.findall(r"(?m)^(COPY|RUN) (.*)$", joined)]


def ignored(folder: str, names: list[str]) -> set[str]:
    """What .dockerignore leaves out of a folder of the repository, as shutil.copytree asks for it."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    anywhere = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    at_root = [pattern for pattern in patterns if Path(folder) == ROOT]
    return {name for pattern in (*anywhere, *at_root) for name in fnmatch.filter(names, pattern)}


def build(image: Path, dockerfile: str, cuda: str | None = "13.0") -> dict[str, str]:
    """Run a Dockerfile below `image`; returns the environment of its commands. A RUN that fails raises."""
    base, tools = image / "base", image / "tools"
    venv.create(base, symlinks=True)  # pip is one of the packages behind it
    packages = base / "lib" / Path(sysconfig.get_path("purelib")).parent.name / "site-packages"
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib"))
    for name, text in {
        "torch/__init__.py": f"class version:\n    cuda = {cuda!r}\n",
        "torch-2.11.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n",
    }.items():
        (packages / name).parent.mkdir()
        (packages / name).write_text(text)
    tools.mkdir()
    for name in ("useradd", "install"):  # what must not be done to this machine
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {image}/asked\n')
        (tools / name).chmod(0o755)
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**outer, "PATH": f"{tools}:{base}/bin:{os.environ['PATH']}", "USER_ID": "1000"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip's 0 means: build with what is there
    workdir = image / "opt" / "mudit"
    workdir.mkdir(parents=True)
    (image / "tmp").mkdir()
    for word, rest in instructions(dockerfile):
        if word == "RUN":
            command = re.sub(r"(?<![\w.])/(tmp|work)/", rf"{image}/\1/", rest)
            subprocess.run(
                ["sh", "-ec", command], cwd=workdir, env=environment, check=True, capture_output=True, timeout=300
            )
            continue
        *sources, target = rest.split()
        for source in sources:
            to = workdir / target / (source if target.endswith("/") else "")
            to.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(ROOT / source, to)
    return environment


def test_the_image_runs_its_code(tmp_path: Path) -> None:
    environment = build(tmp_path, DOCKERFILE)
    code, elsewhere = tmp_path / "opt" / "mudit", tmp_path / "work"
    elsewhere.mkdir()

    def say(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    assert say("python", "-c", "import torch; print(torch.__file__)").startswith(str(tmp_path / "base"))
    assert say(str(code / "docker/entrypoint.sh"), "python", "-c", IMPORT) == str(code / "trainer/config/load.py")
    assert (tmp_path / "asked").read_text().splitlines() == [
        "useradd --non-unique --uid 1000 --create-home mudit",
        f"install -d -o 1000 {tmp_path}/work/runs {tmp_path}/work/cache",
    ]


def test_a_broken_line_is_seen(tmp_path: Path) -> None:
    broken = DOCKERFILE.replace("COPY pyproject.toml constraints.txt ./", "COPY constraints.txt ./")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(tmp_path, broken)
    assert "pyproject.toml" in str(failed.value.stderr), failed.value.stderr
