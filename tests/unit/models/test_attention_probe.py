"""A kernel that is missing, raises or computes something else is found before it is used, and the next one is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import Kernel, kernel_in_use
from models.attention_probe import Choice, choose_kernel
from tests.helpers import varlen
from tests.helpers.varlen import varlen_on_cpu

CPU = torch.device("cpu")


def choose(wanted: Kernel = "varlen", dtype: torch.dtype = torch.bfloat16) -> Choice:
    return choose_kernel(wanted, CPU, dtype, 2, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_kernel_that_is_right_is_taken(dtype: torch.dtype) -> None:
    with varlen_on_cpu():
        assert choose(dtype=dtype) == Choice("varlen", {})


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        ("varlen", {"varlen": "NotImplementedError: ", "efficient": "RuntimeError: No viable backend"}),
        ("cudnn", {"cudnn": "RuntimeError: No viable", "varlen": "NotImpl", "efficient": "RuntimeError: No viable"}),
        ("flash3", {"flash3": "ModuleNotFoundError: ", "varlen": "NotImpl", "efficient": "RuntimeError: No viable"}),
        ("efficient", {"efficient": "RuntimeError: No viable backend"}),
        ("math", {}),
    ],
)
def test_what_a_cpu_lacks_is_passed_over_in_order(wanted: Kernel, missing: dict[str, str]) -> None:
    kernel, rejected = choose(wanted)
    assert kernel == "math"
    assert list(rejected) == list(missing)
    assert all(why.startswith(missing[name]) and "\n" not in why for name, why in rejected.items())
    assert kernel_in_use() == "sdpa"


def test_the_next_one_is_taken_where_it_works() -> None:
    with varlen_on_cpu():
        kernel, rejected = choose("cudnn")
    assert (kernel, list(rejected)) == ("varlen", ["cudnn"])


# ----------------------------------------------------------------------------------------------------------- planted


def raises(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available\nfor this device")


def sharper(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return varlen.forward(1.5 * q, *rest)


def sees_the_padding(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *most: Any) -> tuple[Tensor, ...]:
    """Each row is one sequence, as if there were no second one."""
    queries, keys = (ends[::2].repeat_interleave(2)[1:].contiguous() for ends in (queries, keys))
    return varlen.forward(q, k, v, queries, keys, *most)


def nan_in_the_padding(*inputs: Any) -> tuple[Tensor, ...]:
    out, *rest = varlen.forward(*inputs)
    if len(inputs[0]) == len(inputs[1]):
        out[128] = torch.nan  # the first row's text has no token
    return out, *rest


def nan_gradient(*inputs: Any) -> tuple[Tensor, ...]:
    dq, dk, dv = varlen.backward(*inputs)
    dk[5, 1, 3] = torch.nan
    return dq, dk, dv


def half_the_gradient(*inputs: Any) -> tuple[Tensor, ...]:
    dq, dk, dv = varlen.backward(*inputs)
    return dq, dk, dv / 2


def of_equal_lengths_alone(*inputs: Any) -> tuple[Tensor, ...]:
    """Wrong where queries and keys are not of the same number."""
    dq, dk, dv = varlen.backward(*inputs)
    return (dq, dk, dv) if len(dq) == len(dk) else (dq.flip(0), dk, dv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ({"forward": raises}, "RuntimeError: no kernel image is available"),
        ({"backward": raises}, "RuntimeError: no kernel image is available"),
        ({"forward": sharper}, "the output of joint attention differs by 0."),
        ({"forward": sees_the_padding}, "the output of joint attention differs by 0."),
        ({"forward": nan_in_the_padding}, "the output of joint attention differs by nan"),
        ({"backward": nan_gradient}, "dk of joint attention differs by nan"),
        ({"backward": half_the_gradient}, "dv of joint attention differs by 0.5 of the largest value, 0.04 allowed"),
        ({"backward": of_equal_lengths_alone}, "dq of attention of images to both differs by"),
    ],
)
def test_a_planted_fault_is_told_and_passed_over(planted: dict[str, Any], told: str) -> None:
    with varlen_on_cpu(**planted):
        kernel, rejected = choose()
        assert kernel_in_use() == "varlen"
    assert kernel == "math"
    assert rejected["varlen"].startswith(told), rejected
    assert "\n" not in rejected["varlen"]
