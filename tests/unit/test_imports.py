"""Who may import what, how, and how long a file may be: the table of architecture.md, held over the source tree."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("models", "data", "trainer", "launch")

# Decision 15, by import name.
PACKAGES = (
    "torch", "deepspeed", "accelerate", "webdataset", "transformers", "wandb", "diffusers", "pydantic", "yaml",
    "optuna", "safetensors", "fsspec", "pyarrow", "numpy", "PIL", "simplejpeg", "sentencepiece", "jinja2",
    "matplotlib", "tqdm",
)  # fmt: skip
OPTIONAL = ("wandb", "matplotlib", "optuna", "deepspeed")  # may be imported inside a function


class Room(NamedTuple):
    """packages: third-party; modules: our own; never: taken out of both. The standard library is free to all."""

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    never: tuple[str, ...] = ()


DATA_PACKAGES = (
    "torch", "numpy", "PIL", "simplejpeg", "fsspec", "pyarrow", "webdataset", "transformers", "diffusers",
)  # fmt: skip
STATE = (
    "trainer.state", "trainer.optim", "trainer.ema", "trainer.checkpoint", "trainer.checkpoint_files",
    "trainer.metrics", "trainer.health", "trainer.skipping", "trainer.jumps", "trainer.stopping", "trainer.watchdog",
    "trainer.rollback", "trainer.pace",
)  # fmt: skip
STEP = ("trainer.state", "trainer.parallel")
STATE_ROOM = Room(("torch",), (*STATE, "trainer.mup", "trainer.parallel"))
WHOLE = Room(("torch", "optuna", "matplotlib"), ("models.flops", "trainer", "data"))

# The longest prefix of a module's name is its room; a module of trainer/ without one must be added here.
# trainer.build, the one composition root, and launch stand only in the lists of those that may import them.
ROOMS: dict[str, Room] = {
    "models": Room(("torch",), ("models",), ("torch.distributed",)),
    "models.configs": Room((), ()),
    "data": Room(DATA_PACKAGES, ("data",), ("torch.distributed",)),
    "data.config": Room((), ()),
    "trainer.config": Room(
        ("pydantic", "yaml"),
        ("models.configs", "data.config", "trainer.config_files", "trainer.config_conflicts", "trainer.cells"),
    ),
    "trainer.config_conflicts": Room((), ("trainer.config", "trainer.cells")),
    "trainer.cells": Room((), ("trainer.config", "data.config")),
    "trainer.config_files": Room(("yaml",), ()),
    "trainer.mup": Room((), ("trainer.mup.rules", "trainer.mup.table")),
    "trainer.mup.apply": Room(("torch",), ("trainer.mup",)),
    "trainer.mup.coord": Room(("torch",), ("trainer.mup",)),
    "trainer.diffusion": Room(("torch", "diffusers"), ("trainer.diffusion",)),
    "trainer.parallel": Room(("torch", "accelerate", "deepspeed"), ("trainer.parallel",)),
    **dict.fromkeys(STATE, STATE_ROOM),
    "trainer.metrics": STATE_ROOM._replace(packages=("torch", "wandb", "matplotlib")),
    "trainer.loop": Room(("torch",), STATE),
    # Built by trainer.build, which it is a part of.
    "trainer.frozen": Room(
        ("torch",),
        (
            "data",
            "models.layers",
            "trainer.config",
            "trainer.diffusion",
            "trainer.parallel",
            "trainer.state",
            "trainer.ahead",
        ),
    ),
    "trainer.ahead": Room(("torch",), ()),
    "trainer.evaluate": Room(
        ("torch", "numpy", "transformers", "matplotlib"), ("trainer.evaluate", "trainer.diffusion", "data")
    ),
    "trainer.evaluate.suite": Room(("pydantic",), ("trainer.config", "trainer.config_files")),
    "trainer.search": WHOLE,
    "trainer.estimate": WHOLE,
    "trainer.resume": Room((), ("trainer.checkpoint", "trainer.config", "trainer.mup.table", "trainer.parallel.mesh")),
    "trainer.source": Room(
        ("torch",), ("data", "trainer.cells", "trainer.checkpoint", "trainer.config", "trainer.parallel.mesh")
    ),
    "trainer.build": Room(PACKAGES, ("models", "data", "trainer")),
    "launch": Room(PACKAGES, ("trainer", "data", "launch")),
}

NO_TORCH = ("models.configs", "data.config", "trainer.config", "trainer.config_files", "trainer.evaluate.suite")


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `prefixes` or lies inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def room_of(module: str) -> str | None:
    """The longest prefix that has a room."""
    return max((room for room in ROOMS if within(module, (room,))), key=len, default=None)


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Absolute dotted names that an import statement takes; `from a import b` takes a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = [node.module] if node.module else []
        if node.level:
            above = package.split(".")
            parts = [*above[: len(above) - node.level + 1], *parts]
        yield from (".".join([*parts, alias.name]) for alias in node.names)


def walk(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it lies inside a function."""
    yield node, inside
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, inside or function)


def check_source(path: str, source: str) -> list[str]:
    """Breaches of the import rules in the file at `path`, relative to the repository: "file:line: rule"."""
    tree = ast.parse(source)
    module = path.removesuffix(".py").replace("/", ".")
    package, _, leaf = module.rpartition(".")
    if leaf == "__init__":
        # An import here would run for everyone who imports a neighbour: trainer.config would load torch.
        return [f"{path}:{tree.body[0].lineno}: a package's __init__.py is empty"] if tree.body else []
    place = room_of(module)
    if place is None:
        return [f"{path}:1: {module} has no room: add it to ROOMS with what it may import"]
    room, found = ROOMS[place], []
    for node, inside in walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in room.never:
            found.append((node.lineno, f"{place} must never use {ast.unparse(node)}"))
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if relative and place == "launch":
            found.append((node.lineno, "launch is run by path, where a relative import fails: write launch.NAME"))
        for name in imported(node, package):
            top = name.partition(".")[0]
            if inside and top not in OPTIONAL:
                found.append((node.lineno, f"{name} imported inside a function; only {', '.join(OPTIONAL)} may be"))
            if not relative and place != "launch" and within(name, (package,)):
                found.append((node.lineno, f"{name} lies in its own folder: import it relatively"))
            allowed = room.modules if top in FOLDERS else (*room.packages, *sys.stdlib_module_names)
            if not within(name, allowed) or within(name, room.never):
                may = ", ".join((*room.packages, *room.modules)) or "the standard library only"
                found.append((node.lineno, f"{place} may not import {name} (may: {may})"))
    return [f"{path}:{line}: {rule}" for line, rule in sorted(found)]


def check_length(path: str, source: str) -> list[str]:
    """Breach of the budget of lines: a model file 350, the loop 250, any other file 500."""
    budget = 350 if path.startswith("models/") else 250 if path == "trainer/loop.py" else 500
    lines = len(source.splitlines())
    return [f"{path}:{lines}: {lines} lines are over the budget of {budget}"] if lines > budget else []


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path relative to the repository, text) of its Python files."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports(folder: str) -> None:
    files = list(sources(folder))
    assert files
    breaches = [breach for path, source in files for breach in check_source(path, source)]
    assert not breaches, "\n" + "\n".join(breaches)


def test_line_budgets() -> None:
    files = [*sources(*FOLDERS, "benchmarks"), *((path.name, path.read_text()) for path in ROOT.glob("*.py"))]
    breaches = [breach for path, source in files for breach in check_length(path, source)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize("module", NO_TORCH)
def test_config_needs_no_torch(module: str) -> None:
    code = f"import {module}, sys; heavy = {{'torch', 'numpy'}} & sys.modules.keys(); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/mmdit.py", "import math\nimport torch.nn.functional as F\nfrom .configs import A\n"),
        ("models/configs.py", "from dataclasses import dataclass\n"),
        ("data/reader.py", "import numpy as np\nfrom PIL import Image\nfrom .order import Order\n"),
        ("trainer/config.py", "import yaml\nfrom data.config import A\nfrom models.configs import B\n"),
        ("trainer/mup/apply.py", "import torch\nfrom torch.distributed.tensor import DTensor\n"),
        ("trainer/metrics.py", "def f():\n    import wandb\n"),
        ("trainer/checkpoint.py", "from .parallel.engine import Engine\nfrom . import state\n"),
        (
            "trainer/evaluate/metrics.py",
            "from trainer.diffusion.flow import A\nfrom ..diffusion import flow\n",
        ),
        ("trainer/search/study.py", "from models.flops import A\nfrom trainer.build import B\n"),
        ("trainer/build.py", "import deepspeed\nfrom .loop import train\nfrom models.registry import A\n"),
        ("launch/train.py", "import tqdm\nfrom launch.common import run\nfrom trainer.build import A\n"),
        ("trainer/mup/__init__.py", ""),
    ],
)
def test_checker_accepts(path: str, source: str) -> None:
    assert check_source(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("models/dit.py", "import os\nfrom data.batch import Batch\n", "2: models may not import data.batch.Batch"),
        ("models/dit.py", "import numpy\n", "1: models may not import numpy"),
        ("models/dit.py", "import torch.distributed as dist\n", "1: models may not import torch.distributed"),
        ("models/dit.py", "from torch import distributed\n", "1: models may not import torch.distributed"),
        ("models/dit.py", "import torch\n\ntorch.distributed.barrier\n", "3: models must never use torch.distributed"),
        ("models/dit.py", "from models.layers import MLP\n", "1: models.layers.MLP lies in its own folder"),
        ("models/configs.py", "from .layers import MLP\n", "1: models.configs may not import models.layers.MLP"),
        ("models/configs.py", "import torch\n", "1: models.configs may not import torch"),
        ("data/reader.py", "from trainer.config import A\n", "1: data may not import trainer.config.A"),
        ("data/reader.py", "from torch.distributed import rpc\n", "1: data may not import torch.distributed.rpc"),
        ("trainer/config.py", "from models import registry\n", "1: trainer.config may not import models.registry"),
        ("trainer/config.py", "from .mup import rules\n", "1: trainer.config may not import trainer.mup.rules"),
        ("trainer/mup/rules.py", "import torch\n", "1: trainer.mup may not import torch"),
        ("trainer/mup/table.py", "from .apply import A\n", "1: trainer.mup may not import trainer.mup.apply.A"),
        ("trainer/mup/coord.py", "from models.mmdit import A\n", "1: trainer.mup.coord may not import models.mmdit.A"),
        ("trainer/parallel/fsdp.py", "from models.mmdit import A\n", "1: trainer.parallel may not import models"),
        ("trainer/diffusion/flow.py", "from ..parallel import mesh\n", "1: trainer.diffusion may not import"),
        ("trainer/ema.py", "import wandb\n", "1: trainer.ema may not import wandb"),
        ("trainer/state.py", "from data.batch import Batch\n", "1: trainer.state may not import data.batch.Batch"),
        ("trainer/loop.py", "from .config import TrainConfig\n", "1: trainer.loop may not import trainer.config"),
        ("trainer/loop.py", "from .build import build\n", "1: trainer.loop may not import trainer.build.build"),
        ("trainer/evaluate/a.py", "from trainer.build import B\n", "1: trainer.evaluate may not import trainer.build"),
        ("trainer/build.py", "from launch.train import main\n", "1: trainer.build may not import launch.train.main"),
        ("trainer/search/study.py", "from models.mmdit import A\n", "1: trainer.search may not import models.mmdit"),
        ("launch/train.py", "from models.mmdit import A\n", "1: launch may not import models.mmdit.A"),
        ("launch/train.py", "import torchvision\n", "1: launch may not import torchvision"),
        ("launch/train.py", "from .common import run\n", "1: launch is run by path"),
        ("launch/a.py", "def f():\n    def g():\n        import json\n", "3: json imported inside a function"),
        ("launch/a.py", "async def f():\n    from trainer import b\n", "2: trainer.b imported inside a function"),
        ("trainer/new.py", "import os\n", "1: trainer.new has no room"),
        ("trainer/__init__.py", "import os\n", "1: a package's __init__.py is empty"),
    ],
)  # fmt: skip
def test_checker_refuses(path: str, source: str, expected: str) -> None:
    (breach,) = check_source(path, source)
    assert breach.startswith(f"{path}:{expected}")


def test_checker_reports_every_breach_in_order() -> None:
    source = "from models.mmdit import A\nimport torch\n\n\ndef f():\n    from data.batch import B\n"
    breaches = check_source("trainer/mup/rules.py", source)
    assert [breach.split(":")[1] for breach in breaches] == ["1", "2", "6", "6"]


@pytest.mark.parametrize(
    ("path", "budget"),
    [("models/mmdit.py", 350), ("trainer/loop.py", 250), ("trainer/build.py", 500), ("setup.py", 500)],
)
def test_budgets(path: str, budget: int) -> None:
    assert check_length(path, "x\n" * budget) == []
    assert check_length(path, "x\n" * (budget + 1)) == [
        f"{path}:{budget + 1}: {budget + 1} lines are over the budget of {budget}"
    ]


def test_no_line_of_the_trainer_names_a_backbone() -> None:
    """A new backbone is a file in models/; the trainer must not know which there are."""
    pattern = re.compile(r"mmdit|pixart|u-?vit|\bdit\b", re.IGNORECASE)
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "trainer").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not named, "\n".join(named)
