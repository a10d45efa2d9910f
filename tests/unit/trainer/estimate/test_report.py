"""What the estimate reads of encoders' files."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from trainer.estimate.report import _stored_parameters


def test_numbers_are_counted_from_headers_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert _stored_parameters(str(tmp_path), None) is None
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 2]}, "b": {"shape": []}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert _stored_parameters(str(tmp_path), None) == 7
    for content in (b"", header, b"\xff" * 99, (9).to_bytes(8, "little") + b"[" * 9, (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"model\.safetensors cannot be read \(.*fetch it again"):
            _stored_parameters(str(tmp_path), None)
