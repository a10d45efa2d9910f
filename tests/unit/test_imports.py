"""Who may import what, how, and how long a file may be: the table of architecture.md, held over the source tree."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest

from tests.helpers.paths import ROOT
from trainer.provenance import rooms

FOLDERS = tuple(rooms())

# Decision 15, by import name.
PACKAGES = (
    "torch", "deepspeed", "accelerate", "webdataset", "transformers", "wandb", "diffusers", "pydantic", "yaml",
    "optuna", "safetensors", "fsspec", "pyarrow", "numpy", "PIL", "sentencepiece", "jinja2", "matplotlib", "rich",
    "huggingface_hub", "plotly", "starlette", "tensorboard", "trackio", "uvicorn",
)  # fmt: skip
# May be imported inside a function.
OPTIONAL = ("wandb", "matplotlib", "optuna", "deepspeed", "torchao", "tensorboard", "trackio")


class Room(NamedTuple):
    """packages: third-party; modules: our own; never: taken out of both. The standard library is free to all."""

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    never: tuple[str, ...] = ()


DATA_PACKAGES = ("torch", "numpy", "PIL", "fsspec", "pyarrow", "webdataset", "transformers", "diffusers")
# What a run is made of, and what advances: it knows neither models nor data nor config files.
RUN = (
    "trainer.step", "trainer.state", "trainer.run", "trainer.ema", "trainer.rollback", "trainer.checkpoint",
    "trainer.recovery", "trainer.monitor", "trainer.mup", "trainer.parallel", "trainer.errors", "trainer.files",
    "trainer.collectives", "data.errors", "data.files", "data.redaction",
)  # fmt: skip
RUN_ROOM = Room(("torch",), RUN)
SUBJECT = Room(("torch", "numpy", "optuna", "matplotlib", "rich"), ("models.flops", "trainer", "data"))
CONFIG = (
    "models.configs", "models.model_config", "models.registry", "data.config", "data.errors", "data.redaction",
    "trainer.config", "trainer.errors",
)  # fmt: skip

# The longest prefix of a module's name is its room; a module of trainer/ without one must be added here.
# trainer.build, the one composition root, stands only in the lists of those that may import it.
ROOMS: dict[str, Room] = {
    "models": Room(("torch",), ("models",), ("torch.distributed",)),
    "models.configs": Room(("pydantic",), ("models.model_config",)),
    "models.model_config": Room(("pydantic",), ()),
    "models.registry": Room((), ("models.model_config",)),
    "data": Room(DATA_PACKAGES, ("data",), ("torch.distributed",)),
    "data.config": Room(("pydantic",), ("data.errors", "data.redaction")),
    "data.templates": Room(("jinja2",), ()),
    "data.errors": Room((), ()),
    "data.redaction": Room((), ()),
    "trainer.errors": Room((), ()),
    "trainer.config": Room(("pydantic", "yaml"), CONFIG),
    "trainer.mup": Room((), ("trainer.mup.kinds", "trainer.mup.rules", "trainer.mup.table")),
    "trainer.mup.apply": Room(("torch",), ("trainer.mup",)),
    "trainer.diffusion": Room(("torch", "diffusers"), ("trainer.diffusion",)),
    "trainer.parallel": Room(("torch", "accelerate", "deepspeed", "torchao"), ("trainer.parallel", "trainer.errors")),
    "trainer.files": Room((), ("trainer.errors", "data.files", "data.lock_file")),
    "trainer.provenance": Room((), ()),
    "trainer.lr_schedule": Room((), ("trainer.config",)),
    **dict.fromkeys(
        (
            name
            for name in RUN
            if name.startswith("trainer.")
            and name not in ("trainer.mup", "trainer.parallel", "trainer.errors", "trainer.files")
        ),
        RUN_ROOM,
    ),
    "trainer.monitor": RUN_ROOM._replace(
        packages=("torch", "wandb", "tensorboard", "trackio", "matplotlib", "rich", "PIL")
    ),
    "trainer.loop": RUN_ROOM,
    # Whether a checkpoint's config allows the run to go on is a question about configs.
    "trainer.checkpoint.resume": Room(
        (), ("trainer.checkpoint", "trainer.config", "trainer.errors", "trainer.mup.table", "trainer.parallel.mesh")
    ),
    # Where data, encoders and config meet: built by trainer.build.
    "trainer.input": Room(
        ("torch",),
        (
            "data",
            "models.layers",
            "trainer.config",
            "trainer.diffusion",
            "trainer.input",
            "trainer.parallel",
            "trainer.step",
            "trainer.errors",
            "trainer.collectives",
        ),
    ),
    "trainer.evaluate": Room(
        ("torch", "numpy", "pydantic", "yaml", "transformers", "matplotlib"),
        ("trainer.evaluate", "trainer.diffusion", "trainer.config", "trainer.errors", "trainer.files", "data"),
    ),
    **dict.fromkeys(("trainer.search", "trainer.estimate", "trainer.coord_check", "trainer.forecast"), SUBJECT),
    # What a run has left in its folder, as a page: it starts at once, without torch.
    "trainer.page": Room(
        ("plotly", "yaml"),
        (
            "data.errors",
            "data.files",
            "data.redaction",
            "data.templates",
            "trainer.page",
            "trainer.errors",
            "trainer.files",
            "trainer.monitor.records",
            "trainer.checkpoint.meta",
            "trainer.forecast.track",
        ),
    ),
    "trainer.page.study_data": Room((), ("data", "trainer.page", "trainer.errors", "trainer.search.study")),
    # Followed by runs, and so below trainer.build.
    "trainer.forecast.track": Room((), ("data.files", "trainer.config", "trainer.errors")),
    "trainer.build": Room(PACKAGES, ("models", "data", "trainer")),
    "export": Room(
        ("torch", "safetensors", "diffusers", "transformers", "huggingface_hub", "yaml"),
        (
            "models",
            "data.encoders",
            "data.config",
            "data.files",
            "data.errors",
            "data.redaction",
            "data.templates",
            "trainer",
            "export",
        ),
    ),
    "launch": Room(PACKAGES, ("trainer", "data", "export", "launch")),
}

NO_TORCH = (
    "models.configs",
    "models.model_config",
    "models.registry",
    "data.config",
    "data.errors",
    "data.redaction",
    "trainer.errors",
    "trainer.config.load",
    "trainer.estimate.cluster",
    "trainer.evaluate.suite",
    "trainer.recovery.signals",
    "trainer.page.html",
)


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
            # A command imports what it runs once its arguments are right: --help and a misspelt key wait for no torch.
            if inside and top not in OPTIONAL and not (place == "launch" and top in FOLDERS):
                found.append((node.lineno, f"{name} imported inside a function; only {', '.join(OPTIONAL)} may be"))
            if not relative and place != "launch" and within(name, (package,)):
                found.append((node.lineno, f"{name} lies in its own folder: import it relatively"))
            allowed = room.modules if top in FOLDERS else (*room.packages, *sys.stdlib_module_names)
            if not within(name, allowed) or within(name, room.never):
                may = ", ".join((*room.packages, *room.modules)) or "the standard library only"
                found.append((node.lineno, f"{place} may not import {name} (may: {may})"))
    return [f"{path}:{line}: {rule}" for line, rule in sorted(found)]


def check_length(path: str, source: str) -> list[str]:
    """Breaches of the budgets of lines: a model file 350, the loop 250, a file of launch/ 150, any other 500; a
    function in a room 60."""
    found, room = [], path.partition("/")[0]
    budget = {"models": 350, "launch": 150}.get(room, 500) if path != "trainer/loop.py" else 250
    if (lines := len(source.splitlines())) > budget:
        found.append(f"{path}:{lines}: {lines} lines are over the budget of {budget}")
    for node in ast.walk(ast.parse(source)) if room in FOLDERS else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > 60:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, more than 60")
    return found


def imported_modules(path: str, source: str, modules: Collection[str]) -> set[str]:
    """Those of `modules` that the file imports, wherever it does: at the top, in a function, or for type checking."""
    package = path.removesuffix(".py").replace("/", ".").rpartition(".")[0]
    names = {name for node in ast.walk(ast.parse(source)) for name in imported(node, package)}
    return {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)


def circle(files: Iterable[tuple[str, str]]) -> list[str]:
    """Modules that import each other in a circle, [] where there is none."""
    files = list(files)
    modules = [path.removesuffix(".py").replace("/", ".") for path, _ in files]
    graph = {module: imported_modules(*file, modules) for module, file in zip(modules, files, strict=True)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


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


def test_no_circle_of_imports() -> None:
    assert not (found := circle(sources(*FOLDERS))), " -> ".join(found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("from .b import B\n", "from .a import A\n"),
        ("from . import b\n", "def f():\n    from trainer.a import A\n"),
        ("import trainer.b\n", "if TYPE_CHECKING:\n    from .a import A\n"),
    ],
)
def test_circles_are_found(one: str, other: str) -> None:
    files = [("trainer/a.py", one), ("trainer/b.py", other), ("trainer/c.py", "from .a import A\n")]
    assert set(circle(files)) == {"trainer.a", "trainer.b"}
    assert circle([files[0], ("trainer/b.py", ""), files[2]]) == []


def test_trainer_has_at_most_a_dozen_loose_files() -> None:
    assert len([path for path in (ROOT / "trainer").glob("*.py") if path.name != "__init__.py"]) <= 12


def test_line_budgets() -> None:
    files = [*sources(*FOLDERS, "benchmarks"), *((path.name, path.read_text()) for path in ROOT.glob("*.py"))]
    breaches = [breach for path, source in files for breach in check_length(path, source)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.slow
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
        ("trainer/config/load.py", "import yaml\nfrom data.config import A\nfrom models.configs import B\n"),
        ("trainer/mup/apply.py", "import torch\nfrom torch.distributed.tensor import DTensor\n"),
        ("trainer/monitor/metrics.py", "def f():\n    import wandb\n"),
        ("trainer/checkpoint/write.py", "from .parallel.engine import Engine\nfrom . import state\n"),
        (
            "trainer/evaluate/metrics.py",
            "from trainer.diffusion.flow import A\nfrom ..diffusion import flow\n",
        ),
        ("trainer/search/study.py", "from models.flops import A\nfrom trainer.build import B\n"),
        ("trainer/build/run.py", "import deepspeed\nfrom .loop import train\nfrom models.registry import A\n"),
        ("launch/train.py", "import rich\nfrom launch.common import run\nfrom trainer.build.run import A\n"),
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
        ("trainer/config/load.py", "from models import mmdit\n", "1: trainer.config may not import models.mmdit"),
        ("trainer/config/load.py", "from ..mup import rules\n", "1: trainer.config may not import trainer.mup.rules"),
        ("trainer/mup/rules.py", "import torch\n", "1: trainer.mup may not import torch"),
        ("trainer/mup/table.py", "from .apply import A\n", "1: trainer.mup may not import trainer.mup.apply.A"),
        ("trainer/coord_check/slopes.py", "from models import mmdit\n", "1: trainer.coord_check may not import models"),
        ("trainer/parallel/fsdp.py", "from models.mmdit import A\n", "1: trainer.parallel may not import models"),
        ("trainer/diffusion/flow.py", "from ..parallel import mesh\n", "1: trainer.diffusion may not import"),
        ("trainer/ema.py", "import wandb\n", "1: trainer.ema may not import wandb"),
        ("trainer/state.py", "from data.batch import Batch\n", "1: trainer.state may not import data.batch.Batch"),
        ("trainer/loop.py", "from .config import TrainConfig\n", "1: trainer.loop may not import trainer.config"),
        ("trainer/loop.py", "from .build import build\n", "1: trainer.loop may not import trainer.build.build"),
        ("trainer/evaluate/a.py", "from trainer.build import B\n", "1: trainer.evaluate may not import trainer.build"),
        ("trainer/build/run.py", "from launch.train import main\n", "1: trainer.build may not import launch"),
        ("trainer/search/study.py", "from models.mmdit import A\n", "1: trainer.search may not import models.mmdit"),
        ("launch/train.py", "from models.mmdit import A\n", "1: launch may not import models.mmdit.A"),
        ("launch/train.py", "import torchvision\n", "1: launch may not import torchvision"),
        ("launch/train.py", "from .common import run\n", "1: launch is run by path"),
        ("launch/a.py", "def f():\n    def g():\n        import json\n", "3: json imported inside a function"),
        ("export/a.py", "async def f():\n    from trainer import b\n", "2: trainer.b imported inside a function"),
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
    [("models/mmdit.py", 350), ("trainer/loop.py", 250), ("trainer/build/run.py", 500), ("launch/train.py", 150)],
)
def test_budgets(path: str, budget: int) -> None:
    assert check_length(path, "x\n" * budget) == []
    assert check_length(path, "x\n" * (budget + 1)) == [
        f"{path}:{budget + 1}: {budget + 1} lines are over the budget of {budget}"
    ]
    long = "class A:\n    def f(self):\n" + "        x\n" * 60
    assert check_length(path, long) == [f"{path}:2: f has 61 lines, more than 60"]


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
