"""Factors by kind of module or name pattern, on rows of either optimizer."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from trainer.build.engine import build_mup_table
from trainer.config.load import load_config, to_yaml
from trainer.errors import ConfigError
from trainer.mup.kinds import ChoiceError
from trainer.mup.rules import Optimizer, Parametrization, Settings
from trainer.mup.table import MuTable

from .cases import CASES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
Factors = Mapping[str, Mapping[str, float]]
MMDIT = CASES["mmdit"]


def with_factors(case: Case, factors: Factors, settings: Settings | None = None) -> MuTable:
    return case.table(4.0, replace(settings or Settings(), factors=factors))


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
def test_factors_are_on_what_they_name(case: Case, optimizer: Optimizer, parametrization: Parametrization) -> None:
    settings = Settings(parametrization, optimizer=optimizer, role_lr={"hidden": 3.0})
    plain = case.table(4.0, settings)
    factors = {"attention": {"lr": 0.5, "weight_decay": 2.0, "init": 1.25}, "*mlp.fc1.*": {"lr": 4.0}}
    table = with_factors(case, factors, settings)
    # By hand: what attention is called in the four backbones.
    parts = ("attention.", ".qkv.", ".kv.", ".norm_q.", ".norm_k.", ".out.")
    attention = {name for name in case.snapshot if any(part in name for part in parts)}
    first = {name for name in case.snapshot if "mlp.fc1." in name}
    assert attention
    assert first
    for name, row in table.rows.items():
        before = plain.rows[name]
        if name in attention:
            assert row == replace(
                before, lr=before.lr * 0.5, weight_decay=before.weight_decay * 2, init_std=before.init_std * 1.25
            ), name
        elif name in first:
            assert row == replace(before, lr=before.lr * 4), name
        else:
            assert row == before, name


def test_keys_may_share_a_parameter_if_not_a_factor() -> None:
    table = with_factors(
        MMDIT, {"attention": {"lr": 0.5}, "blocks.0.*": {"init": 2.0}, "blocks.0.text.*": {"weight_decay": 3}}
    )
    plain = MMDIT.table(4.0).rows["blocks.0.text.qkv.weight"]
    expected = replace(plain, lr=plain.lr * 0.5, init_std=plain.init_std * 2, weight_decay=plain.weight_decay * 3)
    assert table.rows["blocks.0.text.qkv.weight"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        (
            {"attenton": {"lr": 2.0}},
            r'mup\.factors "attenton" names no parameter: .* \(attention, .*\) .* matches one of ',
        ),
        ({"attenton": {}}, r'mup\.factors "attenton" names no parameter'),
        ({"blocks.*.imag.*": {"lr": 2.0}}, r'"blocks\.\*\.imag\.\*" names no parameter'),
        (
            {"attention": {"lr": 2.0}, "blocks.1.image.*": {"lr": 2.0}},
            r'"attention" and "blocks\.1\.image\.\*" both set lr of blocks\.1\.image\.(qkv|norm|out)\S+:',
        ),
        (
            {"text": {"init": 2.0}, "time": {"init": 3.0}, "mlp": {"init": 2.0}},
            r'"text" and "mlp" both set init of blocks\.0\.text\.mlp\.fc1\.weight: let them name different',
        ),
        ({"*.bias": {"weight_decay": 2.0}}, r'"\*\.bias" sets weight_decay of parameters that have none: none of them'),
        ({"final": {"init": 2.0}}, None),
        ({"final.*": {"init": 2.0}}, r'"final\.\*" sets init of parameters that have none: all of them start at zero'),
    ],
)
def test_factors_that_do_not_fit(factors: Factors, problem: str | None) -> None:
    if problem is None:  # its modulation starts with numbers, if the final layer does not
        assert with_factors(MMDIT, factors).hash != MMDIT.table(4.0).hash
        return
    with pytest.raises(ChoiceError, match=problem):
        with_factors(MMDIT, factors)


def test_all_of_them_are_told_at_once() -> None:
    with pytest.raises(ChoiceError) as error:
        with_factors(MMDIT, {"gone": {"lr": 2.0}, "text": {"lr": 2.0}, "image": {"lr": 1.5}, "mlp": {"lr": 3.0}})
    text = str(error.value)
    assert all(part in text for part in ('"gone"', '"text" and "mlp"', '"image" and "mlp"'))
    assert text.count("mup.factors") == 3, "once for each pair, not for each parameter"


def test_the_hash_knows_factors_that_act() -> None:
    plain = MMDIT.table(4.0)
    off, on = with_factors(MMDIT, {"mlp": {}}), with_factors(MMDIT, {"mlp": {"lr": 2.0}, "time": {}})
    assert off.to_json() == plain.to_json()
    assert on.to_json()["settings"]["factors"] == {"mlp": {"lr": 2.0}}
    assert on.hash != plain.hash


# ---------------------------------------------------------------------------------------------------------- of configs
DEBUG = "mmdit_debug_mup.yaml"


def test_in_a_config() -> None:
    """In a file by kind and by pattern, and by kind as an override."""
    given = [
        'mup.factors={"blocks.*.image.mlp*": {lr: 1.5}, attention: {weight_decay: 2}}',
        "mup.factors.attention.lr=3",
    ]
    config = load_config(DEBUG, given)
    factors = {key: of.model_dump() for key, of in config.mup.factors.items()}
    assert factors == {
        "blocks.*.image.mlp*": {"lr": 1.5, "weight_decay": 1.0, "init": 1.0},
        "attention": {"lr": 3.0, "weight_decay": 2.0, "init": 1.0},
    }
    rows, plain = build_mup_table(config).rows, build_mup_table(load_config(DEBUG)).rows
    assert rows["blocks.0.image.mlp.fc1.weight"].lr == 1.5 * plain["blocks.0.image.mlp.fc1.weight"].lr
    assert rows["blocks.0.text.qkv.weight"].lr == 3 * plain["blocks.0.text.qkv.weight"].lr
    assert rows["blocks.0.text.qkv.weight"].weight_decay == 2 * plain["blocks.0.text.qkv.weight"].weight_decay


def test_the_written_config_reads_back(tmp_path: object) -> None:
    config = load_config(DEBUG, ['mup.factors={"blocks.*.image.mlp*": {lr: 1.5}}'])
    path = f"{tmp_path}/config.yaml"
    with open(path, "w") as file:
        file.write(to_yaml(config))
    assert load_config(path).mup == config.mup


def test_a_factor_of_one_is_none() -> None:
    assert (
        build_mup_table(load_config(DEBUG, ["mup.factors.mlp.lr=1"])).hash == build_mup_table(load_config(DEBUG)).hash
    )


def test_factors_that_do_not_fit_are_mistakes_in_the_config() -> None:
    config = load_config(DEBUG, ["mup.factors.skip.lr=2"])
    with pytest.raises(
        ConfigError, match=r'^mup\.factors "skip" names no parameter: give a kind of module \(attention,'
    ):
        build_mup_table(config)
