"""What a command's imports are spared."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

from launch.processes import importing


def test_imports_are_not_looked_through_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they come, nor afterwards: of a list that refers to itself the collector sees nothing more."""
    source = "import gc\npaused = not gc.isenabled()\nkept = []\nkept.append(kept)\n"
    (tmp_path / "slow_to_import.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with importing():
        imported = importlib.import_module("slow_to_import")
    monkeypatch.delitem(sys.modules, "slow_to_import")
    assert imported.paused
    assert gc.isenabled()
    assert not any(known is imported.kept for known in gc.get_objects())


def test_where_nothing_is_imported_nothing_is_frozen() -> None:
    """What is frozen is never freed as garbage, and a test calls a command's main() often."""
    frozen = gc.get_freeze_count()
    with importing():
        import json
    assert json.__name__ in sys.modules
    assert gc.get_freeze_count() <= frozen
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
