"""launch/preflight.py in a world whose last process computes slowly, for a test to find."""

import os
import time

import torch

from launch import preflight
from launch.common import run

if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
    product = torch.mm

    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(1.5)
        return product(a, b)

    torch.mm = slow

run(preflight.main)
