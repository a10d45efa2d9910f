"""What commands import once their arguments are right: imported where tests/helpers/forked.py forks them from."""

import importlib

from launch.processes import importing

MODULES = (
    "trainer.build.run", "trainer.build.inference", "trainer.evaluate.results", "trainer.estimate.micro_batch",
    "trainer.loop",
)  # fmt: skip

with importing():
    for name in MODULES:
        importlib.import_module(name)
