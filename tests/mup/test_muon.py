"""Which weights Muon updates, and by what rules: the roles and numbers are written down here by hand."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from torch import nn

from models.layers import Declaration
from trainer.build.engine import base_rates, build_mup_table
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.mup.apply import build_table, param_groups
from trainer.mup.kinds import ChoiceError
from trainer.mup.rules import Optimizer, Settings, WeightDecayRule, factors
from trainer.mup.table import BaseRates, MuTable, TableError

from .cases import CASES, Case
from .golden_hashes import HASHES

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MUON = Settings(optimizer="muon")
BASE: dict[Optimizer, BaseRates] = {"adamw": BaseRates(2e-3, 0.1, 1e-12), "muon": BaseRates(8e-3, 0.3, 0.0)}


class Own(NamedTuple):
    """Of a weight of Muon at the width 192: matrices, whole and by heads of 12 features; the scale of each of these."""

    matrices: int
    scale: float
    heads: int
    head_scale: float


WIDE, TALL, FLAT = Own(1, 1.0, 1, 1.0), Own(1, 2.0, 1, 2.0), Own(1, 0.5, 1, 0.5)  # [D, D], [4 D, D], [D, 4 D]
BY_HEAD = 0.25  # sqrt(12 / 192)
QKV, KV, Q = Own(3, 1.0, 48, BY_HEAD), Own(2, 1.0, 32, BY_HEAD), Own(1, 1.0, 16, BY_HEAD)
MLP = {"mlp.fc1.weight": TALL, "mlp.fc2.weight": FLAT}
BLOCK = {"attention.qkv.weight": QKV, "attention.out.weight": WIDE, **MLP}
STREAM = {"qkv.weight": QKV, "out.weight": WIDE, **MLP}
GATE = Own(2, (8 / 3) ** 0.5, 2, (8 / 3) ** 0.5)  # [8/3 D, D] twice; it has no heads
GATED = {"mlp.fc1.weight": GATE, "mlp.fc2.weight": Own(1, (3 / 8) ** 0.5, 1, (3 / 8) ** 0.5)}
CROSS = {"q.weight": Q, "kv.weight": KV, "out.weight": WIDE}


def under(prefix: str, rows: dict[str, Own]) -> dict[str, Own]:
    return {f"{prefix}.{name}": row for name, row in rows.items()}


UVIT = {**under("in_blocks.0", BLOCK), **under("mid_block", BLOCK), **under("out_blocks.0", BLOCK)}
EXPECTED: dict[str, dict[str, Own]] = {
    "mmdit": {
        **under("blocks.0.image", STREAM),
        **under("blocks.0.text", STREAM),
        **under("blocks.1.image", STREAM),
        "blocks.1.text.kv.weight": KV,
    },
    "mmdit_options": {
        **under("blocks.0.image", {**STREAM, **GATED}),
        **under("blocks.0.text", {**STREAM, **GATED}),
        **under("blocks.1", {**STREAM, **GATED}),
    },
    "dit": {**under("blocks.0", BLOCK), **under("blocks.1", BLOCK)},
    "pixart": {
        **under("blocks.0", BLOCK),
        **under("blocks.1", BLOCK),
        **under("blocks.0.cross_attention", CROSS),
        **under("blocks.1.cross_attention", CROSS),
    },
    "uvit": UVIT,
    "uvit_text": UVIT,
}


def of_muon(table: MuTable) -> set[str]:
    return {name for name, row in table.rows.items() if row.optimizer == "muon"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_rows_of_muon(kind: str) -> None:
    """Those of attention and MLP and no others, each of q, k and v on its own; AdamW's are as without Muon."""
    case, expected = CASES[kind], EXPECTED[kind]
    plain, table, by_head = case.table(4.0), case.table(4.0, MUON), case.table(4.0, replace(MUON, muon_head_dim=12))
    assert of_muon(table) == of_muon(by_head) == expected.keys()
    for name, row in table.rows.items():
        before = plain.rows[name]
        if name not in expected:
            assert row == by_head.rows[name] == before
            continue
        own = expected[name]
        changed = replace(before, lr=1.0, weight_decay=1.0, eps=0.0, optimizer="muon")
        assert row == replace(changed, matrices=own.matrices, scale=pytest.approx(own.scale)), name
        heads = replace(changed, matrices=own.heads, scale=pytest.approx(own.head_scale))
        assert by_head.rows[name] == heads, name


@pytest.mark.parametrize(("rule", "decay"), [("independent", 1.0), ("sqrt", 0.5), ("coupled", 0.25)])
def test_rules_of_muon(rule: WeightDecayRule, decay: float) -> None:
    """lr x wd goes with the width as under AdamW, though Muon's lr does not; init and multiplier are the same."""
    settings = Settings(wd_rule=rule, eps_rule="width")
    muon, adamw = (factors("hidden", 4.0, 9.0, settings, optimizer=name) for name in ("muon", "adamw"))
    assert muon.lr * muon.weight_decay == adamw.lr * adamw.weight_decay == decay
    assert (muon.lr, muon.eps) == (1.0, 0.0)
    assert (muon.init, muon.multiplier) == (adamw.init, adamw.multiplier) == (0.5, 1.0)


@pytest.mark.slow
@every_case
def test_sp_has_the_scale_and_no_factors(case: Case) -> None:
    sp = replace(MUON, parametrization="sp", wd_rule="coupled")
    mup, table = case.table(4.0, MUON), case.table(4.0, sp)
    assert of_muon(table) == of_muon(mup)
    for name in of_muon(table):
        row = table.rows[name]
        assert (row.lr, row.weight_decay, row.eps, row.scale) == (1.0, 1.0, 0.0, mup.rows[name].scale)


def test_depth_and_role_factors_are_on_muon_too() -> None:
    table = CASES["dit"].table(4.0, replace(MUON, branch_lr=0.5, branch_scale=0.25, role_lr={"hidden": 3.0}))
    assert {table.rows[name].lr for name in of_muon(table)} == {1.5}
    assert {table.rows[name].weight_decay for name in of_muon(table)} == {1.0}


@pytest.mark.slow
@every_case
def test_groups_of_muon(case: Case) -> None:
    table = case.table(4.0, replace(MUON, wd_rule="coupled", role_lr={"hidden": 2.0}))
    model = case.model(4.0, table)
    named = dict(model.named_parameters())
    groups = param_groups(named.items(), table, BASE)
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(named)
    scales = []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is named[name]
            assert table.rows[name].optimizer == group["optimizer"]
        assert group["lr"] == pytest.approx(2e-3 * group["lr_scale"]), "what a schedule of optim.lr makes of it"
        if group["optimizer"] == "adamw":
            assert not group.keys() & {"scale", "matrices", "shapes"}
            continue
        settings = (group["lr"], group["lr_scale"], group["weight_decay"], group["eps"])
        assert settings == pytest.approx((16e-3, 8.0, 0.075, 0.0))
        for name, matrices, shape in zip(group["param_names"], group["matrices"], group["shapes"], strict=True):
            row = table.rows[name]
            assert (group["scale"], matrices, shape) == (row.scale, row.matrices, tuple(named[name].shape))
        scales.append(group["scale"])
    assert sorted(scales) == sorted({table.rows[name].scale for name in of_muon(table)}), "one group for each scale"


def test_groups_of_adamw_have_the_settings_alone() -> None:
    table = CASES["mmdit"].table(4.0)
    for group in param_groups(CASES["mmdit"].model(4.0, table).named_parameters(), table, {"adamw": BASE["adamw"]}):
        assert group.keys() == {"params", "param_names", "optimizer", "lr", "lr_scale", "weight_decay", "eps"}
        assert group["optimizer"] == "adamw"
        assert group["lr_scale"] in {1.0, 0.25}


def test_written_and_told() -> None:
    table = CASES["mmdit"].table(4.0, MUON)
    data = table.to_json()
    assert data["settings"]["optimizer"] == "muon"
    of_rows = {name: row["optimizer"] for name, row in data["rows"].items()}
    assert {name for name, optimizer in of_rows.items() if optimizer == "muon"} == EXPECTED["mmdit"].keys()
    assert set(of_rows.values()) == {"muon", "adamw"}
    assert {"matrices", "scale"} <= data["rows"]["blocks.0.text.qkv.weight"].keys()
    assert not {"matrices", "scale"} & data["rows"]["final.weight"].keys()
    plain = CASES["mmdit"].table(4.0).to_json()
    assert not any({"optimizer", "matrices", "scale"} & row.keys() for row in plain["rows"].values())
    lines = {line.split()[0]: line.split() for line in table.describe(BASE).splitlines()}
    assert lines["parameter"][-4:] == ["optimizer", "matrices", "scale", "tensors"]
    assert lines["blocks.*.image.qkv.weight"] == [
        "blocks.*.image.qkv.weight", "576x192", "hidden", "0.0722", "1", "1", "0.008", "1", "0.3", "0", "0",
        "muon", "3", "1", "2",
    ]  # fmt: skip
    assert lines["blocks.*.image.modulation.weight"][5:] == [
        "0.25", "0.0005", "4", "0.4", "1", "1e-12", "adamw", "-", "-", "2"
    ]  # fmt: skip
    assert table.in_use(BASE)["blocks.0.image.out.weight"] == {"lr": 8e-3, "weight_decay": 0.3, "eps": 0.0}


# ------------------------------------------------------------------------------------------------- what a person chose


@pytest.mark.parametrize(
    ("include", "exclude", "more", "less"),
    [
        (("modulation",), (), {"blocks.0.image.modulation.weight", "blocks.1.text.modulation.weight"}, set()),
        (("*pooled_embed.fc2*",), (), {"pooled_embed.fc2.weight"}, set()),
        (("time",), (), {"time_embed.fc2.weight"}, set()),
        ((), ("blocks.0.text.*",), set(), EXPECTED["mmdit"].keys() & {"blocks.0.text.out.weight"}),
        ((), ("mlp",), set(), {"blocks.0.image.mlp.fc1.weight"}),
        (("modulation",), ("text",), {"blocks.0.image.modulation.weight"}, {"blocks.1.text.kv.weight"}),
    ],
)
def test_include_and_exclude(
    include: tuple[str, ...], exclude: tuple[str, ...], more: set[str], less: set[str]
) -> None:
    """By kind and by pattern; a kind stands for its matrices from width to width."""
    found = of_muon(CASES["mmdit"].table(4.0, replace(MUON, muon_include=include, muon_exclude=exclude)))
    assert more <= found - EXPECTED["mmdit"].keys() or not more
    assert less <= EXPECTED["mmdit"].keys() - found or not less
    assert bool(found - EXPECTED["mmdit"].keys()) == bool(more)
    assert bool(EXPECTED["mmdit"].keys() - found) == bool(less)


def test_exclude_wins() -> None:
    found = of_muon(CASES["uvit"].table(4.0, replace(MUON, muon_include=("skip", "time"), muon_exclude=("skip",))))
    assert found - EXPECTED["uvit"].keys() == {"time_embed.fc1.weight", "time_embed.fc2.weight"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (
            {"muon_include": ("patch_embed.*",)},
            r'include "patch_embed\.\*" names patch_embed\.weight, which is input \(',
        ),
        ({"muon_include": ("*.weight",)}, r'include "\*\.weight" names patch_embed\.weight, which is input \(Linear'),
        ({"muon_include": ("final.weight",)}, r'include "final\.weight" names final\.weight, which is output \('),
        ({"muon_include": ("blocks.*.moduation.*",)}, r"names no weight .* kind of module \(attention, mlp, .*final\)"),
        ({"muon_include": ("patch",)}, r'include "patch" names no weight of a linear layer from width to width'),
        ({"muon_include": ("*.bias",)}, r'include "\*\.bias" names no weight of a linear layer from width to width'),
        ({"muon_include": ("mlp",)}, r'include "mlp" adds nothing: blocks\.0\.image\.mlp\.fc1\.weight, .* without it'),
        (
            {"muon_exclude": ("modulation",)},
            r'exclude "modulation" takes nothing from Muon: .* its 13 matrices \(blocks',
        ),
        ({"muon_exclude": ("blocks.7.*",)}, r'exclude "blocks\.7\.\*" takes nothing'),
        ({"muon_exclude": ("attention", "mlp")}, r"no matrix is left for Muon; .* use optim\.kind adamw"),
    ],
)
def test_choices_that_do_not_fit(choice: dict[str, Any], problem: str) -> None:
    with pytest.raises(ChoiceError, match=problem):
        CASES["mmdit"].table(4.0, replace(MUON, **choice))


def test_all_of_them_are_told_at_once() -> None:
    both = replace(MUON, muon_include=("patch_embed.*", "gone"), muon_exclude=("nothing",))
    with pytest.raises(ChoiceError) as error:
        CASES["mmdit"].table(4.0, both)
    assert all(f'"{key}"' in str(error.value) for key in ("patch_embed.*", "gone", "nothing"))


@pytest.mark.parametrize(
    ("projections", "why"),
    [(3, r"fc\.weight \(16, 16\): .*declares 3 projections"), (5, "5 projections")],
)
def test_projections_that_the_shape_contradicts(projections: int, why: str) -> None:
    declared = [Declaration("*.weight", "fan_in", projections=projections), Declaration("*.bias", "zeros")]
    for layer in (lambda width: nn.Linear(width, width), lambda width: nn.Linear(12, width)):
        with pytest.raises(TableError, match=why if layer(16).in_features == 16 else "projections, which only"):
            build_table(lambda width, layer=layer: Holder(layer(width)), 8, 16, 4, declared, Settings())


def test_heads_that_the_shape_contradicts() -> None:
    declared = [Declaration("*.weight", "fan_in", projections=2), Declaration("*.bias", "zeros")]
    settings = replace(MUON, muon_head_dim=5)
    with pytest.raises(TableError, match=r"fc\.weight \(16, 16\): 2 projections of heads of 5 rows"):
        build_table(lambda width: Holder(nn.Linear(width, width)), 8, 16, 4, declared, settings, {"mlp": ["fc.*"]})


class Holder(nn.Module):
    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc


# ---------------------------------------------------------------------------------------------------------- of configs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmdit", "dit", "pixart", "uvit"])
def test_of_a_config(kind: str) -> None:
    keys = ["optim.kind=muon", "optim.lr=0.001", "optim.muon.lr=0.02", "optim.muon.weight_decay=0.5"]
    config = load_config(f"{kind}_debug_mup.yaml", keys)
    table = build_mup_table(config)
    assert of_muon(table)
    assert base_rates(config) == {
        "adamw": BaseRates(0.001, config.optim.weight_decay, config.optim.eps),
        "muon": BaseRates(0.02, 0.5, 0.0),
    }
    by_head = build_mup_table(load_config(f"{kind}_debug_mup.yaml", [*keys, "optim.muon.by_head=true"]))
    heads = {row.shape[0] // row.matrices for name, row in by_head.rows.items() if ".qkv.weight" in name}
    assert heads == {config.model.head_dim}
    assert {row.shape[0] // row.matrices for n, row in table.rows.items() if ".qkv.weight" in n} == {config.model.width}


def test_a_choice_that_does_not_fit_is_a_mistake_in_the_config() -> None:
    config = load_config("uvit_debug_mup.yaml", ["optim.kind=muon", "optim.muon.include=[modulation]"])
    with pytest.raises(ConfigError, match=r'^optim\.muon\.include "modulation" names no weight'):
        build_mup_table(config)


def test_without_muon_there_is_one_optimizer() -> None:
    assert base_rates(load_config("dit_debug_mup.yaml")).keys() == {"adamw"}


@pytest.mark.slow
@pytest.mark.parametrize("name", HASHES)
def test_runs_without_muon_keep_their_table(name: str) -> None:
    """A resumed run compares hashes: new columns and options must not change those of runs that lack them."""
    assert build_mup_table(load_config(f"{name}.yaml")).hash == HASHES[name]
