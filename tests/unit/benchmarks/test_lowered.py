"""Counts of kernels and traffic: those that are committed, and what counts them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy

from tests.helpers.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
BLOCKS = {
    "mmdit_2b": {"Block", "LastBlock"},
    "pixart_0.61b": {"Block"},
    "dit_xl_2": {"Block"},
    "uvit_h_2": {"Block", "SkipBlock"},
}
ROW, COLUMN, FEATURE = sympy.symbols("row column feature")


def committed(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"lowered_{name}.json").read_text())


def reached(index: sympy.Expr, *size: int) -> tuple[Any, int]:
    from torch._inductor.dependencies import MemoryDep  # imports of inductor warn, which ends a collection of tests

    from benchmarks.lowered import place

    return place(MemoryDep("buffer", index, (ROW, COLUMN, FEATURE), tuple(map(sympy.Integer, size))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_an_index_reaches_what_it_reads() -> None:
    assert reached(24 * ROW + 6 * COLUMN + FEATURE, 2, 4, 6) == (0, 48)
    assert reached(6 * ROW + FEATURE, 2, 4, 6) == (0, 12)  # one row for all columns
    assert reached(72 * ROW + 18 * COLUMN + FEATURE + 6, 2, 4, 6) == (6, 48)  # the second of three parts
    assert reached(24 * ROW + 6 * (COLUMN - 3) + FEATURE, 2, 7, 6) == (-18, 48)  # the second of two parts, put together


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_size_that_varies_counts_as_that_of_the_batch() -> None:
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.virtualized import V

    from benchmarks.lowered import place

    tokens = sympy.Symbol("tokens", integer=True, positive=True)
    sizevars = SimpleNamespace(optimization_hint=lambda size: int(size.subs(tokens, 4)))
    two, six = sympy.Integer(2), sympy.Integer(6)
    whole = MemoryDep("buffer", 6 * tokens * ROW + 6 * COLUMN + FEATURE, (ROW, COLUMN, FEATURE), (two, tokens, six))
    each_second = MemoryDep("buffer", 12 * tokens * ROW + FEATURE + 6 * tokens, (ROW, FEATURE), (two, 6 * tokens))
    graph: Any = SimpleNamespace(sizevars=sizevars)
    with V.set_graph_handler(graph):
        assert place(whole) == (0, 48)
        assert place(each_second) == (24, 48)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_committed_counts_name_their_kernels(name: str) -> None:
    found = committed(name)
    assert found["config"] == f"{name}_mup.yaml"
    assert found["pretended"] == "h200"
    assert set(found["blocks"]) == BLOCKS[name]
    for block in found["blocks"].values():
        forward, backward = block["forward"], block["backward"]
        assert forward["other"] == backward["other"] == []
        assert backward["gemms"] == 2 * forward["gemms"]  # of the input and of the weight
        operations = [operation.partition(".default")[0] for operation in forward["attention"]]
        assert operations
        assert {*operations} <= {"torch_attn._varlen_attn", "aten._scaled_dot_product_flash_attention"}
        assert sorted(backward["attention"]) == sorted(f"{operation}_backward.default" for operation in operations)
        assert 0 < forward["triton_d"] < backward["triton_d"]
        assert block["saved_d"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_the_committed_counts_are_those_of_the_code(name: str, tmp_path: Path) -> None:
    """Fails where a change of the models or of torch changes them: say which, and commit the new ones."""
    pytest.importorskip("triton", reason="triton is missing; benchmarks/lowered.py says how to get it")
    before, output = committed(name), tmp_path / "lowered.json"
    command = [sys.executable, "-m", "benchmarks.lowered", "--config", before["config"], "--device", "h200"]
    options = ["--rows", str(before["rows"]), "--output", str(output), *before["overrides"]]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(output.read_text())["blocks"] == before["blocks"]
