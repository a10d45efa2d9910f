"""MMDiT with options that Stable Diffusion 3 does not have: each against a second computation, and what all must do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.configs import MMDiTConfig
from models.layers import SwiGLU
from tests.helpers.backbones import check_bfloat16, check_flops, check_gradients, count, relative

CONFIG = MMDiTConfig(width=48, depth=3, head_dim=16, pos_embed_max_size=12, pos_embed_base_size=4)
OPTIONS = {
    "no QK-norm": replace(CONFIG, qk_norm=False),
    "swiglu": replace(CONFIG, mlp="swiglu"),
}
every_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)


@every_option
def test_every_parameter_gets_a_gradient(config: MMDiTConfig) -> None:
    check_gradients(config, {"final.weight", "final.bias"})


@every_option
@pytest.mark.parametrize(("height", "width", "length"), [(8, 8, 7), (8, 12, 3)])
def test_flops_equal_those_of_the_counter(config: MMDiTConfig, height: int, width: int, length: int) -> None:
    check_flops(config, height, width, length)


@every_option
def test_bfloat16(config: MMDiTConfig) -> None:
    check_bfloat16(config)


# ---------------------------------------------------------------------------------------------------------- mlp: swiglu
@torch.no_grad()
def test_swiglu_is_its_formula() -> None:
    mlp = SwiGLU(8, 24).double()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, features = (mlp.fc1.weight[rows] @ x.mT + mlp.fc1.bias[rows, None] for rows in (slice(24), slice(24, 48)))
    expected = (gate / (1 + (-gate).exp()) * features).mT @ mlp.fc2.weight.T + mlp.fc2.bias
    assert relative(mlp(x), expected) <= 1e-12
    assert relative(F.silu(features).mT @ mlp.fc2.weight.T, expected) > 1e-2  # gate and features are told apart


@pytest.mark.parametrize(("head_dim", "hidden"), [(64, 168), (72, 192), (128, 344), (16, 40), (4, 8)])
def test_swiglu_grows_with_the_width_exactly(head_dim: int, hidden: int) -> None:
    for heads in (1, 3, 8):
        config = MMDiTConfig(width=heads * head_dim, head_dim=head_dim, mlp="swiglu")
        assert config.mlp_hidden == heads * hidden


def test_swiglu_has_about_as_many_parameters() -> None:
    plain, gated = (count(MMDiTConfig(width=512, mlp=mlp), in_channels=16) for mlp in ("gelu", "swiglu"))
    assert plain != gated
    assert abs(gated / plain - 1) < 0.01
