"""Attention over packed rows equals attention with a mask, for every backbone, length of text and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import (
    Packing,
    Visible,
    attend,
    kernel_in_use,
    kernel_restored,
    use_kernel,
    visible,
    visible_from,
)
from models.backbone import build_model
from models.configs import DiTConfig, MMDiTConfig, PixArtConfig, UViTConfig
from models.layers import TextCondition
from models.model_config import ModelConfig
from tests.helpers.backbones import CHANNELS, TEXT_WIDTH, image, labels, random_model
from tests.helpers.varlen import check, varlen_on_cpu

BACKBONES: dict[str, ModelConfig] = {
    "mmdit": MMDiTConfig(width=32, depth=3, head_dim=16, pos_embed_max_size=8, pos_embed_base_size=4),
    "mmdit, options": MMDiTConfig(width=32, depth=3, head_dim=16, positions="rope", single_depth=1, qk_norm=False),
    "pixart": PixArtConfig(width=32, depth=2, head_dim=16, pos_embed_base_size=4),
    "dit": DiTConfig(width=32, depth=2, head_dim=16, num_classes=10),
    "uvit": UViTConfig(width=32, depth=2, head_dim=16, input_size=4, num_classes=10),
    "uvit, text": UViTConfig(width=32, depth=2, head_dim=16, input_size=4, condition="text", text_length=7),
}
WITH_TEXT = ["mmdit", "mmdit, options", "pixart", "uvit, text"]
LENGTHS = torch.tensor([0, 1, 5, 7])


def condition(config: ModelConfig) -> Any:
    """Labels, or texts of no token, one, some and all; what stands in the padding would be seen."""
    if config.condition == "label":
        return labels(4, config.num_classes)
    states = torch.randn(4, 7, TEXT_WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return TextCondition(states, torch.arange(7) < LENGTHS[:, None])


def results(config: ModelConfig) -> list[Tensor]:
    """Prediction, features of a middle block, and the gradients of the image and of all weights, in float64."""
    model = random_model(config, torch.float64)
    x, t = image(batch=4)
    x = x.double().requires_grad_()
    prediction, features = model(x, t, condition(config), features_at=1)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = (prediction * weights).sum() + features.square().sum()
    return [prediction, features, *torch.autograd.grad(loss, [x, *model.parameters()])]


def difference(config: ModelConfig) -> float:
    """The largest one between the two forms, relative to the largest value of each result."""
    expected = results(config)
    with varlen_on_cpu():
        found = results(config)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", BACKBONES.values(), ids=BACKBONES)
def test_packed_rows_equal_a_mask(config: ModelConfig) -> None:
    assert difference(config) < 1e-14


def all_is_text(mask: Tensor, before: int = 0) -> Visible:
    return visible(torch.ones_like(mask), before)


def one_token_too_few(mask: Tensor, before: int = 0) -> Visible:
    return visible(mask & mask.roll(-1, 1), before)


def tokens_before_the_text_are_forgotten(mask: Tensor, before: int = 0) -> Visible:
    return visible(F.pad(mask, (0, before)))


FAULTS = [(kind, fault) for kind in WITH_TEXT for fault in (all_is_text, one_token_too_few)]
FAULTS += [(kind, tokens_before_the_text_are_forgotten) for kind in WITH_TEXT if kind != "pixart"]  # which has none


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_the_comparison_sees_faults(kind: str, fault: Callable[..., Visible], monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(mask: Tensor, before: int = 0) -> Visible:
        return fault(mask, before) if kernel_in_use() == "varlen" else visible(mask, before)

    monkeypatch.setattr(f"models.{kind.partition(',')[0]}.visible", faulty)
    assert difference(BACKBONES[kind]) > 1e-3


def test_queries_of_the_padding_are_seen_to_be_missing() -> None:
    """Images that ask as if their rows had a text's padding read other keys than their own."""
    mask = torch.arange(3) < torch.tensor([1, 3])[:, None]
    x = torch.randn(2, 4, 8)
    with varlen_on_cpu():
        seen = visible(mask, before=4)
        assert isinstance(seen, Packing)
        assert seen.queries.tolist() == seen.keys.tolist() == [0, 5, 7, 14, 14]
        images = visible_from(x, seen)
        assert isinstance(images, Packing)
        assert (images.queries.tolist(), images.keys) == ([0, 4, 4, 8, 8], seen.keys)
        q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 7, 1, 8)
        with pytest.raises(AssertionError):
            attend(q, k, k, seen)
        assert attend(q, k, k, images).shape == (2, 4, 8)


def test_padding_gets_finite_numbers() -> None:
    q = torch.randn(4, 10, 2, 8)
    with varlen_on_cpu():
        out = attend(q, q, q, visible(torch.arange(7) < LENGTHS[:, None], before=3))
    assert out.isfinite().all()


# ----------------------------------------------------------------------------------------- what is asked of the device


class Calls(TorchDispatchMode):
    """Arguments of each call of the packed operation, and the number of calls of its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: list[Any] = []
        self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name == "_varlen_attn":
            self.packed.append(args)
        self.backward += name == "_varlen_attn_backward"
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_TEXT)
def test_the_flash_operation_gets_what_it_asks_for(kind: str) -> None:
    """On the meta device, in bfloat16: what waits for a number from the device raises there, and so does a tensor that
    is made on the host."""
    config = BACKBONES[kind]
    with torch.device("meta"):
        model = build_model(config, CHANNELS, TEXT_WIDTH).bfloat16()
        x = torch.empty(4, CHANNELS, 8, 8)
        text = TextCondition(torch.empty(4, 7, TEXT_WIDTH), torch.empty(4, 7, dtype=torch.bool))
    with kernel_restored(), Calls() as calls:
        use_kernel("varlen")
        model(x, x[:, 0, 0, 0], text)[0].sum().backward()
    assert len(calls.packed) == calls.backward == len(model.shard_units())
    for q, k, v, queries, keys, most_q, most_k, *_ in calls.packed:
        check(q, k, queries, keys, most_q, most_k)
        assert queries.shape == keys.shape == (9,)
        assert queries.is_meta
        assert keys.is_meta
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert (len(q), len(k), len(v)) == (4 * most_q, 4 * most_k, 4 * most_k)
    shapes = {"mmdit": [(23, 23), (23, 23), (16, 23)], "pixart": 2 * [(16, 7)], "uvit, text": 3 * [(24, 24)]}
    shapes["mmdit, options"] = 3 * [(23, 23)]
    assert [call[5:7] for call in calls.packed] == shapes[kind]


@pytest.mark.parametrize("kind", ["dit", "uvit", "pixart"])
def test_no_mask_where_nothing_is_padded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, plain = [], F.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: Tensor | None) -> Tensor:
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with varlen_on_cpu():
        results(BACKBONES[kind])
    assert masks
    assert masks == [None] * len(masks)


# ---------------------------------------------------------------------------------------------------- the kernel in use


def test_a_kernel_is_used_until_it_is_given_back() -> None:
    q = torch.randn(1, 5, 2, 8)
    expected = attend(q, q, q)
    with kernel_restored():
        use_kernel("math")
        torch.testing.assert_close(attend(q, q, q), expected)
        use_kernel("efficient")
        with pytest.raises(RuntimeError, match="No viable backend"):  # a CPU has none: it is this kernel or nothing
            attend(q, q, q)
    assert kernel_in_use() == "sdpa"


def test_flash3_changes_nothing_where_it_is_not_installed() -> None:
    with pytest.raises(ImportError, match="flash_attn"):
        use_kernel("flash3")
    assert kernel_in_use() == "sdpa"
