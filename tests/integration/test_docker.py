"""docker/Dockerfile's own lines, run in an empty folder and a fresh environment: what it copies, and every RUN.

The environment stands for NVIDIA's base image: it has a torch of its own with CUDA (a stand-in of a few lines, which
pip must leave alone), a PIP_CONSTRAINT that our versions contradict, and the packages of ours behind it: pip must find
there all that pyproject.toml asks for, and has no index to go to.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
TORCH = "2.12.0a0+50eac811a6.nv26.6"
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


def build(image: Path, dockerfile: str, torch: str = TORCH, cuda: str | None = "13.0") -> dict[str, str]:
    """Run a Dockerfile below `image`; returns the environment of its commands. A RUN that fails raises."""
    base, tools = image / "base", image / "tools"
    venv.create(base, symlinks=True)  # pip is one of the packages behind it
    packages = base / "lib" / Path(sysconfig.get_path("purelib")).parent.name / "site-packages"
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib"))
    for name, text in {
        "torch/__init__.py": f"class version:\n    cuda = {cuda!r}\n    git_version = '50eac8'\n",
        f"torch-{torch}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n",
    }.items():
        (packages / name).parent.mkdir()
        (packages / name).write_text(text)
    tools.mkdir()
    for name in ("useradd", "install", "apt-get"):  # what must not be done to this machine
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {image}/asked\n')
        (tools / name).chmod(0o755)
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**outer, "PATH": f"{tools}:{base}/bin:{os.environ['PATH']}", "USER_ID": "1000"}
    (image / "constraint.txt").write_text("numpy==1.26.4\npydantic==2.9.2\nsetuptools==70.3.0\n")
    environment |= {"PIP_CONSTRAINT": f"{image}/constraint.txt"}
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
    assert "usage: mudit COMMAND" in say("mudit", "--help")
    assert "usage: mudit estimate" in say(str(code / "docker/entrypoint.sh"), "estimate", "--help")
    assert say("python", "-c", "import s3fs, importlib.metadata as m; print(m.version('torch'))") == TORCH
    assert (tmp_path / "asked").read_text().splitlines() == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends --no-upgrade ibverbs-providers libibverbs1 librdmacm1",
        "useradd --non-unique --uid 1000 --create-home mudit",
        f"install -d -o 1000 {tmp_path}/work/runs {tmp_path}/work/cache",
    ]


def test_a_broken_line_is_seen(tmp_path: Path) -> None:
    broken = DOCKERFILE.replace("COPY pyproject.toml constraints.txt ./", "COPY constraints.txt ./")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(tmp_path, broken)
    assert "pyproject.toml" in str(failed.value.stderr), failed.value.stderr


@pytest.mark.parametrize(
    ("torch", "cuda", "said"),
    [("2.10.0", "13.0", "torch"), (TORCH, None, "the torch of BASE has no CUDA")],
)
def test_a_base_with_another_torch_is_refused(torch: str, cuda: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(tmp_path, DOCKERFILE, torch, cuda)
    assert said in str(failed.value.stderr), failed.value.stderr


def test_a_torch_that_pip_replaces_fails_the_build(tmp_path: Path) -> None:
    install = "python -m pip install -c /tmp/constraints.txt"
    assert install in DOCKERFILE
    replace = """sed -i s/50eac8/77777/ "$(python -c 'import torch; print(torch.__file__)')" && """
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(tmp_path, DOCKERFILE.replace(install, replace + install))
    assert f"pip replaced the torch of BASE: it was {TORCH} 50eac8" in str(failed.value.stderr)


def test_the_health_check_asks_the_driver_alone(tmp_path: Path) -> None:
    """nvidia-smi opens no CUDA context, which takes hundreds of MiB of a GPU. Without it there is no driver to ask."""
    (line,) = re.findall(r"(?s)^HEALTHCHECK .*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE)
    command = json.loads(line)
    smi = tmp_path / "nvidia-smi"

    def healthy() -> bool:
        return subprocess.run(["/bin/sh", *command[1:]], env={"PATH": str(tmp_path)}, check=False).returncode == 0

    assert command[0] == "sh"
    assert healthy()
    for code in (0, 1):
        smi.write_text(f'#!/bin/sh\n[ "$*" = -L ] && exit {code}\nexit 9\n')
        smi.chmod(0o755)
        assert healthy() is (code == 0)


@pytest.fixture
def entered(tmp_path: Path) -> Callable[..., str]:
    """What docker/entrypoint.sh runs, with stand-ins for python and for what NVIDIA's images start first."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "docker", code / "docker")
    (code / "launch").mkdir()
    for name in ("train", "estimate", "coord_check"):
        (code / "launch" / f"{name}.py").touch()
    first = tmp_path / "nvidia_entrypoint.sh"
    first.write_text('#!/bin/sh\necho "a banner"\nexport COMPAT=yes\nexec "$@"\n')
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$COMPAT" "$@"\n')
    script = code / "docker" / "entrypoint.sh"
    script.write_text(script.read_text().replace("/opt/nvidia/nvidia_entrypoint.sh", str(first)))
    for each in (first, python):
        each.chmod(0o755)

    def run(*command: str, **more: str) -> str:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **more}
        return subprocess.run([script, *command], env=environment, capture_output=True, text=True, check=True).stdout

    return run


def test_the_base_is_entered_first(entered: Callable[..., str], tmp_path: Path) -> None:
    mudit = f"{tmp_path}/code/launch/mudit.py"
    assert entered("estimate", "--json") == f"yes {mudit} estimate --json\n", "and says nothing"
    (tmp_path / "nvidia_entrypoint.sh").unlink()
    assert entered("estimate", "a b", COMPAT="no") == f"no {mudit} estimate a b\n"
    assert entered("coord-check", COMPAT="no") == f"no {mudit} coord-check\n"
    assert entered("echo", "a") == "a\n"
