"""The route of tokens: which blocks see which of them, what comes back, what it costs, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import build_model
from models.configs import DiTConfig, MMDiTConfig, ModelConfig, PixArtConfig, ProjectorConfig, UViTConfig
from models.flops import forward_flops
from models.layers import TextCondition
from models.model_config import RouteConfig
from tests.helpers.backbones import CHANNELS, TEXT_WIDTH, condition_of, image, labels, random_model
from tests.helpers.varlen import varlen_on_cpu
from trainer.diffusion.random import subset

TREAD, SPRINT = RouteConfig(share=0.75, start=1, end=3), RouteConfig(share=0.75, start=1, end=3, fuse="sprint")
SMALL: dict[str, Any] = {"width": 32, "head_dim": 16}
BACKBONES: dict[str, ModelConfig] = {
    "mmdit": MMDiTConfig(**SMALL, depth=4, pos_embed_max_size=8, pos_embed_base_size=4),
    "mmdit, rope": MMDiTConfig(**SMALL, depth=4, positions="rope"),
    "pixart": PixArtConfig(**SMALL, depth=4, pos_embed_base_size=4),
    "dit": DiTConfig(**SMALL, depth=4, num_classes=10),
    "uvit": UViTConfig(**SMALL, depth=4, input_size=4, num_classes=10),
    "uvit, text": UViTConfig(**SMALL, depth=4, input_size=4, condition="text", text_length=7),
}
every_backbone = pytest.mark.parametrize("kind", BACKBONES)
every_fuse = pytest.mark.parametrize("route", [TREAD, SPRINT], ids=["tread", "sprint"])
KEPT = torch.tensor([[0, 3, 7, 14], [1, 2, 9, 15]])  # of 4 x 4 tokens


def routed(kind: str, route: RouteConfig) -> ModelConfig:
    end = 4 if kind.startswith("uvit") else 3  # of five blocks, and of four
    return replace(BACKBONES[kind], route=replace(route, end=end))


def of_image(kind: str, tokens: Tensor, others: int) -> Tensor:
    """The image tokens of what a block is given or gives; U-ViT has `others` as well, before them without a text."""
    if kind == "uvit":
        return tokens[:, others:]
    return tokens[:, : tokens.shape[1] - others]


@every_backbone
@every_fuse
@torch.no_grad()
def test_blocks_of_the_route_see_the_kept_tokens_and_the_others_come_back(kind: str, route: RouteConfig) -> None:
    config = routed(kind, route)
    assert config.route is not None
    model = random_model(config)
    given: list[Tensor] = []
    made: list[Tensor] = []
    for unit in model.shard_units():
        unit.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        unit.register_forward_hook(lambda _, args, out: made.append(out[0] if isinstance(out, tuple) else out))
    x, t = image()
    model(x, t, condition_of(config), kept=KEPT)
    others = {"uvit": 2, "uvit, text": 1 + 7}.get(kind, 0)
    ins, outs = ([of_image(kind, each, others) for each in tokens] for tokens in (given, made))
    first, after = config.route.start, config.route.end
    assert [each.shape[1] for each in ins] == [4 if n in config.route.blocks else 16 for n in range(len(ins))]
    before, places = outs[first - 1], KEPT[..., None].expand(-1, -1, 32)
    assert torch.equal(ins[first], before.gather(1, places))
    if route is TREAD:
        expected = before.clone()
        for row, kept in enumerate(KEPT):
            expected[row, kept] = outs[after - 1][row]
    else:
        deep = model.rejoin.mask_token.expand(2, 16, 32).clone()
        for row, kept in enumerate(KEPT):
            deep[row, kept] = outs[after - 1][row]
        expected = model.rejoin.linear(torch.cat([before, deep], dim=-1))
    if not kind.startswith("uvit"):  # whose next block first joins its input with a skip
        assert torch.allclose(ins[after], expected, atol=1e-6)
        return
    whole = of_image(kind, given[after], others)
    assert torch.allclose(whole, expected, atol=1e-6)


@every_backbone
@every_fuse
@torch.no_grad()
def test_all_tokens_kept_is_no_route(kind: str, route: RouteConfig) -> None:
    config = routed(kind, route)
    model, (x, t) = random_model(config), image()
    condition = condition_of(config)
    whole = model(x, t, condition)[0]
    assert torch.equal(model(x, t, condition, kept=torch.arange(16).expand(2, -1))[0], whole)
    assert not torch.equal(model(x, t, condition, kept=KEPT)[0], whole)
    if route is TREAD:
        plain = build_model(BACKBONES[kind], CHANNELS, TEXT_WIDTH)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x, t, condition)[0], whole)


@every_backbone
@torch.no_grad()
def test_kept_tokens_take_their_places_with_them(kind: str) -> None:
    """In whatever order they are kept."""
    model = random_model(routed(kind, TREAD))
    x, t = image()
    one, other = (model(x, t, condition_of(model.config), kept=kept)[0] for kept in (KEPT, KEPT.flip(1)))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, model(x, t, condition_of(model.config), kept=(KEPT + 1) % 16)[0], atol=1e-3)


@every_backbone
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    config = routed(kind, SPRINT)
    model, (x, t) = random_model(config, torch.float64), image()
    condition = condition_of(config)
    both = model(x, t, condition, kept=KEPT)[0]
    alone = model(x[1:], t[1:], type(condition)(*(part[1:] for part in condition)), kept=KEPT[1:])[0]
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-12)


def results(config: ModelConfig) -> list[Tensor]:
    """Prediction and gradients of a routed pass, where one of the texts is padded."""
    model = random_model(config, torch.float64)
    x, t = image()
    x = x.double().requires_grad_()
    condition = condition_of(config)
    if isinstance(condition, TextCondition):
        condition = condition._replace(mask=torch.arange(7) < torch.tensor([[3], [7]]))
    prediction = model(x, t, condition, kept=KEPT)[0]
    return [prediction, *torch.autograd.grad(prediction.square().sum(), [x, *model.parameters()])]


@pytest.mark.slow
@every_backbone
def test_packed_rows_equal_a_mask(kind: str) -> None:
    config = routed(kind, SPRINT)
    expected = results(config)
    with varlen_on_cpu():
        found = results(config)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.slow
@every_backbone
@every_fuse
@pytest.mark.parametrize("kept", [True, False])
def test_flops(kind: str, route: RouteConfig, kept: bool) -> None:
    config = routed(kind, route)
    with torch.device("meta"):
        model = build_model(config, CHANNELS, TEXT_WIDTH)
    condition, (x, t) = condition_of(config), image()
    meta = type(condition)(*(part.to("meta") for part in condition))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x.to("meta"), t.to("meta"), meta, kept=KEPT.to("meta") if kept else None)
    counted = 2 * forward_flops(config, CHANNELS, TEXT_WIDTH, 16, 7, routed=kept)  # of two images
    assert counted == counter.get_total_flops()


def test_a_projector_in_the_route_sees_the_kept_tokens() -> None:
    config, projector = routed("dit", TREAD), ProjectorConfig(24, 16)
    with_it = [forward_flops(config, CHANNELS, 0, 16, 0, projector, at, routed=True) for at in range(4)]
    without = forward_flops(config, CHANNELS, 0, 16, 0, routed=True)
    of_a_token = 2 * (32 * 24 + 24 * 24 + 24 * 16)
    assert [each - without for each in with_it] == [n * of_a_token for n in (16, 4, 4, 16)]
    assert forward_flops(config, CHANNELS, 0, 16, 0, projector, 1) == forward_flops(
        replace(config, route=None), CHANNELS, 0, 16, 0, projector
    )


@every_backbone
def test_no_parameter_is_dead_without_a_route(kind: str) -> None:
    """All tokens: only the mask token then has no part, which in a routed pass it has."""
    config = routed(kind, SPRINT)
    model, (x, t) = random_model(config), image()
    for kept in (KEPT, None):
        model.zero_grad()
        model(x, t, condition_of(config), kept=kept)[0].square().sum().backward()
        dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        unused = {"label_embed.weight"} & dead if kind in ("dit", "uvit") else set[str]()
        assert dead - unused - {"pos_embed"} == (set() if kept is not None else {"rejoin.mask_token"})


def test_a_route_without_a_model_of_one_is_refused() -> None:
    model, (x, t) = random_model(BACKBONES["dit"]), image()
    with pytest.raises(ValueError, match="the model has none"):
        model(x, t, labels(2, 10), kept=KEPT)


@pytest.mark.parametrize(
    ("kind", "route", "message"),
    [
        ("mmdit", {"start": 2, "end": 2}, "from 2 to 2 does not fit 4 blocks"),
        ("dit", {"start": 1, "end": 4}, "end less than that, because the last block sees all tokens"),
        ("uvit", {"start": 1, "end": 3}, "model.route.end 3 must be 4 with start 1"),
        ("uvit", {"start": 0, "end": 5}, "from 0 to 5 does not fit 5 blocks"),
        ("pixart", {"share": 1.0}, "less than 1"),
        ("pixart", {"share": 0.0}, "greater than 0"),
    ],
)
def test_a_wrong_route(kind: str, route: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message):
        replace(BACKBONES[kind], route=RouteConfig(**{"share": 0.5, "start": 1, "end": 2, **route}))


@pytest.mark.parametrize(("share", "tokens", "kept"), [(0.5, 256, 128), (0.75, 64, 16), (0.3, 10, 7), (0.99, 16, 1)])
def test_how_many_are_kept(share: float, tokens: int, kept: int) -> None:
    assert RouteConfig(share=share, start=0, end=1).kept(tokens) == kept


def test_the_kept_are_a_function_of_the_key_and_any_is_as_likely() -> None:
    keys = torch.arange(4000)
    drawn = subset(keys, 16, 4, "route")
    assert torch.equal(drawn, drawn.sort(dim=1).values)
    assert all(len(set(row)) == 4 for row in drawn[:100].tolist())
    assert torch.equal(subset(keys[7:9], 16, 4, "route"), drawn[7:9])
    share = torch.bincount(drawn.flatten(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    pairs = ((drawn == 3).any(1) & (drawn == 4).any(1)).double().mean()
    assert abs(float(pairs) - 4 * 3 / (16 * 15)) < 0.02
