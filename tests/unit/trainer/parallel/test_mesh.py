"""The device of a process."""

import pytest
import torch

from trainer.errors import ConfigError
from trainer.parallel.mesh import init_world


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 2 and this process sees 2 GPUs"):
        init_world(1)
