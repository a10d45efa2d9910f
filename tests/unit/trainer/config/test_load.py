"""Configs: every shipped file builds, what a user may misspell is named, and what a resumed run may change."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from models.backbone import build_model
from models.registry import MODEL_KINDS
from trainer.build.engine import build_mup_table
from trainer.config.keys import plain
from trainer.config.load import load_config, parse, to_yaml
from trainer.config.resolve import resolve
from trainer.config.resume import check_resume
from trainer.config.schema import TrainConfig
from trainer.config.yaml_files import CONFIG_DIR
from trainer.errors import ConfigError
from trainer.mup.rules import ROLES

# Searches (configs/search) describe studies and suites (configs/evaluate) measurements: they are no configs of runs.
FILES = sorted([*CONFIG_DIR.glob("*.yaml"), *CONFIG_DIR.glob("recipes/*.yaml")])
DEBUG = "mmdit_debug_mup"


def message(*overrides: str, name: str = DEBUG) -> str:
    """The error that `name` with overrides gives."""
    with pytest.raises(ConfigError) as error:
        load_config(name, overrides)
    return str(error.value)


def written(folder: Path, **files: str) -> str:
    """Write NAME.yaml files; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{next(iter(files))}.yaml")


def model_of(config: TrainConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(config.model, config.autoencoder.channels, config.text_encoder.width, config.projector)


# ------------------------------------------------------------------------------------------------- the shipped files
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_config_builds(path: Path) -> None:
    config = load_config(str(path))
    shapes = {name: tuple(p.shape) for name, p in model_of(config).named_parameters()}
    table = build_mup_table(config)
    assert {name: row.shape for name, row in table.rows.items()} == shapes
    assert config.run.name is not None
    resolve(config, 1)


def test_shipped_configs_are_all_found() -> None:
    names = {p.name for p in FILES}
    assert {f"mmdit_{s}_mup.yaml" for s in ("debug", "demo", "0.18b", "0.7b", "2b", "18b")} <= names
    assert {f"{kind}_debug_mup.yaml" for kind in MODEL_KINDS} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("0.18b", 0.17e9, 0.19e9), ("0.7b", 0.68e9, 0.75e9), ("2b", 1.9e9, 2.1e9), ("18b", 17.5e9, 18.5e9)],
)
def test_parameter_counts(name: str, least: float, most: float) -> None:
    """What the names promise; one shape but for the width, so that base hyperparameters transfer."""
    config = load_config(f"mmdit_{name}_mup")
    assert least <= sum(p.numel() for p in model_of(config).parameters()) <= most
    assert (config.model.depth, config.model.head_dim, config.mup.base_width) == (19, 64, 512)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("0.18b", 0.19e9, 0.2e9), ("2b", 1.8e9, 1.9e9), ("18b", 18.3e9, 18.4e9)]
)
def test_rungs_of_pixart_change_the_width_alone(name: str, least: float, most: float) -> None:
    rung, proxy = (plain(load_config(f"pixart_{each}_mup")) for each in (name, "0.04b"))
    assert least <= sum(p.numel() for p in model_of(load_config(f"pixart_{name}_mup")).parameters()) <= most
    differing = {(s, k) for s in proxy for k in proxy[s] if rung[s][k] != proxy[s][k]}
    assert differing == {("model", "width"), ("run", "name")}
    assert name == "0.18b" or rung["model"]["width"] % 16 == 0, "for parallel.precision fp8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("dit_proxy_mup", 42.5e6, 42.7e6),
        ("dit_proxy_sp", 42.5e6, 42.7e6),
        ("dit_xl_2_mup", 674.5e6, 675.5e6),
        ("dit_xl_2_sp", 674.5e6, 675.5e6),
        ("pixart_0.04b_mup", 39.15e6, 39.25e6),
        ("pixart_0.61b_mup", 610.5e6, 611.5e6),
        ("uvit_proxy_mup", 31.6e6, 31.7e6),
        ("uvit_h_2_mup", 500.5e6, 501.5e6),
    ],
)
def test_parameter_counts_of_the_published_models(name: str, least: float, most: float) -> None:
    config = load_config(name)
    assert least <= sum(p.numel() for p in model_of(config).parameters()) <= most
    assert (config.model.depth, config.model.head_dim, config.mup.base_width) == (28, 72, 288)


# (proxy, target): (lr, betas, eps, weight decay, decay, clip, warm-up), (batch, steps) of each.
PUBLISHED = {
    ("dit_proxy_mup", "dit_xl_2_mup"): (
        (2**-10, (0.9, 0.999), 1e-8, 0.0, "matrices", None, 0), (256, 200_000), (256, 2_400_000)),
    ("dit_proxy_sp", "dit_xl_2_sp"): (
        (1e-4, (0.9, 0.999), 1e-8, 0.0, "matrices", None, 0), (256, 200_000), (256, 7_000_000)),
    ("pixart_0.04b_mup", "pixart_0.61b_mup"): (
        (2**-10, (0.9, 0.999), 1e-10, 0.03, "all", 0.01, 1000), (1408, 39_169), (5632, 58_754)),
    ("uvit_proxy_mup", "uvit_h_2_mup"): (
        (2e-4, (0.99, 0.99), 1e-12, 0.03, "matrices", None, 5000), (1024, 500_000), (1024, 500_000)),
}  # fmt: skip


@pytest.mark.parametrize("pair", PUBLISHED, ids=lambda pair: pair[0])
def test_published_hyperparameters(pair: tuple[str, str]) -> None:
    expected, *runs = PUBLISHED[pair]
    for name, run in zip(pair, runs, strict=True):
        config = load_config(name)
        o = config.optim
        assert (o.lr, o.betas, o.eps, o.weight_decay, o.decay, o.clip_norm, o.warmup_steps) == expected
        assert (o.schedule, config.ema.decays, config.ema.warmup) == ("constant", (0.9999,), False)
        assert (config.train.global_batch_size, config.train.steps) == run
        assert config.data.label_dropout == config.text_encoder.dropout == 0.1
        assert (config.data.resolution, config.latent_size, config.autoencoder.channels) == (256, 32, 4)
        assert config.objective.kind == "ddpm"
        schedule = "scaled_linear" if config.model.kind == "uvit" else "linear"
        assert config.objective.beta_schedule == schedule
    proxy, target = (plain(load_config(name)) for name in pair)
    shape = {k for k in proxy["model"] if proxy["model"][k] != target["model"][k]}
    assert shape == {"width"}
    assert {section for section in proxy if proxy[section] != target[section]} <= {"model", "train", "run"}


def test_base_width_is_its_own_base() -> None:
    """At the base width muP changes nothing: base and target shapes are one, every factor is 1."""
    config = load_config(DEBUG, ["model.width=32"])
    assert config.model.width == config.mup.base_width
    for name, row in build_mup_table(config).rows.items():
        assert row.shape == row.base_shape, name
        assert (row.multiplier, row.lr, row.eps) == (1.0, 1.0, 1.0), name
    wider = build_mup_table(load_config(DEBUG)).rows.values()
    assert any(row.shape != row.base_shape and row.lr == 0.5 for row in wider)  # 64 / 32: the loop above can fail


# ------------------------------------------------------------------------------------------------------------ scalars
SCALARS = [
    ("optim.lr", "1e-3", 1e-3),
    ("optim.eps", "2e-12", 2e-12),
    ("optim.lr", "1E-3", 1e-3),
    ("optim.lr", ".5", 0.5),
    ("objective.timestep_mean", "-1e-1", -0.1),
    ("train.steps", "2e3", 2000),
    ("train.steps", "12", 12),
    ("train.seed", "010", 10),  # eight in YAML 1.1
    ("run.resume", "true", True),
    ("run.resume", "false", False),
    ("optim.clip_norm", "null", None),
    ("optim.clip_norm", "~", None),
    ("optim.clip_norm", "", None),
    ("run.name", "off", "off"),  # False in YAML 1.1
    ("run.name", "no", "no"),
    ("run.name", "2024-01-01", "2024-01-01"),  # a date in YAML 1.1
    ("run.name", "1:30", "1:30"),  # ninety in YAML 1.1
    ("run.name", '"12"', "12"),
    ("run.name", "2024_01_05", "2024_01_05"),  # 20240105 to ruamel.yaml
    ("run.name", "0x12", "0x12"),  # eighteen to ruamel.yaml
    ("data.shards", "a-{000..001}.tar", "a-{000..001}.tar"),
    ("sample.prompts", "[a, b]", ("a", "b")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "text", "value"), SCALARS)
def test_scalars(key: str, text: str, value: object, tmp_path: Path) -> None:
    """The same in a file and in an override, of the same type (True == 1 would pass else)."""
    section, _, leaf = key.partition(".")
    path = written(tmp_path, a=f"extends: {DEBUG}\n{section}:\n  {leaf}: {text}\n")
    for config in (load_config(path), load_config(DEBUG, [f"{key}={text}"])):
        got = getattr(getattr(config, section), leaf)
        assert got == value
        assert type(got) is type(value)


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lrr=1", 'optim.lrr: unknown key; did you mean "optim.lr"?'),
        ("optimm.lr=1", 'optimm: unknown key; did you mean "optim"?'),
        ("model.widht=64", 'model.widht: unknown key; did you mean "model.width"?'),
        ("data.resolutoin=32", 'data.resolutoin: unknown key; did you mean "data.resolution"?'),
        # A right name in the wrong section, or in none.
        ("train.lr=1", 'train.lr: unknown key; did you mean "optim.lr"?'),
        ("optim.log_every=1", 'optim.log_every: unknown key; did you mean "train.log_every"?'),
        ("lr=1", 'lr: unknown key; did you mean "optim.lr"?'),
        ("model.zzz=1", "model.zzz: unknown key"),
        ("extends=mmdit_2b_mup", "extends: unknown"),
        # A right key with a wrong value.
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer"),
        ("optim.lr=nan", "optim.lr: Input should be"),
        ("optim.lr=.inf", "optim.lr: Input should be"),
        ("optim.lr=-1", "optim.lr must be greater than 0, got -1"),
        ("optim=", "optim: Input should be"),
        ("optim.lr.x=3", "optim.lr: Input should be a valid number"),
        ("optim.schedule=cosin", "optim.schedule: Input should be"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("model.width=100", "model.width 100 is not a multiple of model.head_dim 16"),
        ("data.flip=2", "data.flip must be between 0 and 1, got 2"),
        ("train.watchdog_factor=1", "train.watchdog_factor must be greater than 1, or null, got 1"),
        # Not of the form section.key=value, or no YAML.
        ("optim.lr", 'override "optim.lr" must have the form section.key=value'),
        ("=3", 'override "=3" must have the form section.key=value'),
        ("sample.prompts=[a", 'override "sample.prompts=[a" is not valid YAML'),
        ("run.name={{name}}", 'override "run.name={{name}}" is not valid YAML'),
    ],
)
def test_one_mistake(override: str, problem: str) -> None:
    lines = [line.strip() for line in message(override).splitlines()]
    whole = problem.endswith(("?", " key"))  # the rest are the first words of a longer message
    assert problem in (lines if whole else "\n".join(lines))


@pytest.mark.parametrize("kind", ["mmdit", "mmditt", "unheard_of"])
def test_several_mistakes_at_once(kind: str) -> None:
    """Also under a model.kind that does not exist: its keys are held against the nearest one."""
    lines = message(f"model.kind={kind}", "model.widht=3", "optim.lrr=2", "data.flipp=1", "train.steps=x").splitlines()
    keys = [line.partition(":")[0].strip() for line in lines[1:]]
    expected = ["model.widht", "optim.lrr", "data.flipp", "train.steps"] + ["model.kind"] * (kind != "mmdit")
    assert sorted(keys) == sorted(expected), "each once"
    assert 'did you mean "model.width"?' in "\n".join(lines)
    assert "mmdit_debug_mup.yaml with overrides:" in lines[0]


def test_known_keys_under_an_unknown_kind() -> None:
    assert "unknown key" not in message("model.kind=mmditt")


def test_the_kind_decides_the_keys_of_a_model() -> None:
    assert (
        message("model.kind=ditt")
        .splitlines()[-1]
        .endswith("model.kind: 'ditt' is none of mmdit, dit, pixart, uvit; did you mean \"dit\"?")
    )
    # A key of one kind alone, held against that kind, another, and the one whose keys fit best.
    uvit = ["model.kind=uvit", "model.pos_embed_max_size=null", "model.pos_embed_base_size=null"]
    assert "model.pos_embed_max_size: unknown key" in message(*uvit)
    assert 'model.final_cov: unknown key; did you mean "model.final_conv"?' in message(*uvit, "model.final_cov=true")
    assert "model.pos_embed_max_size: unknown key" not in message("model.kind=unheard_of")


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_model_without_a_kind_is_an_mmdit(kind: str) -> None:
    text = "model: {width: 144, head_dim: 72}\nmup: {base_width: 144}\nobjective: {kind: ddpm}\n"
    absent = parse(yaml.safe_load(text), "text")
    kinds: dict[str, Any] = dict(MODEL_KINDS)
    assert absent.model == kinds["mmdit"](width=144, head_dim=72)
    named = parse(yaml.safe_load(text), "text", [f"model.kind={kind}"])
    assert named.model == kinds[kind](width=144, head_dim=72)


def test_run_allow_change_knows_the_keys_of_this_kind() -> None:
    text = message("run.allow_change=[model.final_cov]")
    assert 'run.allow_change: "model.final_cov" is no config key' in text


def test_duplicate_key(tmp_path: Path) -> None:
    path = written(tmp_path, a="optim:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 2e-3\n")
    text = message(name=path)
    assert 'key "lr" is given twice' in text
    assert "line 4" in text
    assert path in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[1, 2]", "must be a mapping"), ("a: b: c", "is not valid YAML"), ("extends: [a, b]", "must name one config")],
)
def test_files_that_are_no_config(content: str, problem: str, tmp_path: Path) -> None:
    path = written(tmp_path, a=content)
    text = message(name=path)
    assert problem in text
    assert path in text


def test_unknown_config_names_the_nearest() -> None:
    assert 'did you mean "mmdit_debug_mup.yaml"?' in message(name="mmdit_dbug_mup")
    assert load_config("mmdit_debug_mup.yaml") == load_config(DEBUG) == load_config(str(CONFIG_DIR / f"{DEBUG}.yaml"))


# ------------------------------------------------------------------------------------------------ extends, overrides
def test_extends_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest file wins, key by key; a parent beside the file, not one of that name where the user stands."""
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    written(elsewhere, b="optim:\n  weight_decay: 0.9\n")
    monkeypatch.chdir(elsewhere)
    path = written(
        tmp_path,
        a="extends: b.yaml\noptim:\n  lr: 1\n",
        b="extends: c\noptim:\n  lr: 2\n  eps: 2\ntrain:\n  seed: 2\n",
        c=f"extends: {DEBUG}\noptim:\n  lr: 3\n  eps: 3\n  weight_decay: 3\n",
    )
    config = load_config(path)
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1, 2, 3)
    assert config.train.seed == 2
    assert config.model == load_config(DEBUG).model
    assert config.run.name == "a"


def test_shards_and_sources_stand_in_each_others_place(tmp_path: Path) -> None:
    """Of a file that extends another, and of overrides; given together they are refused."""
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text("extends: mmdit_debug_mup\ndata:\n  shards: a.tar\n  flip: 0.0\n")
    above.write_text("extends: below\ndata:\n  sources:\n    - {shards: b.tar}\n    - {shards: c.tar}\n")
    sources = "data.sources=[{shards: d.tar}]"

    def read(path: Path, *overrides: str) -> tuple[list[str], float]:
        data = load_config(str(path), overrides).data
        return [source.shards for source in data.all_sources()], data.flip

    assert read(above) == (["b.tar", "c.tar"], 0.0)
    assert read(below, sources) == (["d.tar"], 0.0)
    assert read(above, "data.shards=e.tar") == (["e.tar"], 0.0)
    assert load_config(str(above), ["data.shards=synthetic"]).data.synthetic
    assert read(above, "data.shards=synthetic", sources) == (["d.tar"], 0.0)
    stored = tmp_path / "stored.yaml"  # that of a run folder holds both keys
    stored.write_text(to_yaml(load_config(str(above), ["run.name=x"])))
    assert read(stored) == read(above)
    assert read(stored, "data.shards=e.tar") == (["e.tar"], 0.0)
    with pytest.raises(ConfigError, match=r"data\.shards and data\.sources exclude each other"):
        load_config(str(below), ["data.shards=e.tar", sources])


def test_extends_loop(tmp_path: Path) -> None:
    path = written(tmp_path, a="extends: b\n", b="extends: c\n", c="extends: a\n")
    assert "extends itself through a.yaml -> b.yaml -> c.yaml" in message(name=path)


def test_extends_missing_parent(tmp_path: Path) -> None:
    path = written(tmp_path, a="extends: mmdit_dbug_mup\n")
    assert 'config "mmdit_dbug_mup" was found neither' in message(name=path)


def test_overrides_in_order_and_above_the_file() -> None:
    config = load_config(DEBUG, ["optim.lr=1", "optim.eps=5", "optim.lr=2", "run.name=a=b"])
    assert (config.optim.lr, config.optim.eps) == (2, 5)
    assert config.optim.warmup_steps == load_config(DEBUG).optim.warmup_steps == 2, "the file's other keys stay"
    assert config.run.name == "a=b", "only the first = divides"
    nested = load_config(DEBUG, ["optim={lr: 3, schedule: linear}"])
    assert (nested.optim.lr, nested.optim.schedule, nested.optim.warmup_steps) == (3, "linear", 2)


@pytest.mark.parametrize("override", ["run.dir=x", "run.name=", "run.name=null"])
def test_run_name_defaults_to_the_file(override: str) -> None:
    assert load_config(DEBUG, [override]).run.name == DEBUG


def test_a_file_whose_name_names_no_run(tmp_path: Path) -> None:
    path = written(tmp_path, **{"a b": f"extends: {DEBUG}\n"})
    assert "run.name: 'a b' names no folder; expected letters" in message(name=path)
    assert load_config(path, ["run.name=a_b"]).run.name == "a_b"


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=https://me:hunter2@host/a.tar", "data.captions=https://host/a?X-Amz-Signature=hunter2",
        "wandb.project=https://me:hunter2@host", "text_encoder.path=https://me:hunter2@host/x",
        "run.init_from=s3://me:hunter2@host/x", "sample.prompts=['https://me:hunter2@host']",
        "data.sources=[{shards: 'https://me:hunter2@host/a.tar'}]", "wandb.project=hf_hunter2hunter2hunter2hunter2",
        "data.index_cache=https://me:hunter2@host",
    ],
)  # fmt: skip
def test_no_key_stores_a_secret(override: str) -> None:
    with pytest.raises(ConfigError, match=r"holds a password, a token or a signed query .* write \$\{NAME\}") as error:
        load_config(DEBUG, [override])
    assert "hunter2" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- conflicts
@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.resolution=30"], "data.resolution 30 is not a multiple of 4"),
        (["data.resolution=64"], "data.resolution 64 gives 16 tokens a side, more than model.pos_embed_max_size 8"),
        (["mup.base_width=40"], "mup.base_width 40 is not a multiple of model.head_dim 16"),
        (["mup.base_depth=0"], "mup.base_depth must be at least 1, or null, got 0"),
        (["mup.output_multiplier=0"], "mup.output_multiplier must be greater than 0, got 0"),
        (["mup.role_lr.hiden=2"], 'mup.role_lr.hiden: unknown key; did you mean "mup.role_lr.hidden"?'),
        (["mup.role_lr={adaln: 2}"], "mup.role_lr.adaln: unknown key"),
        (["mup.role_lr.output=-1"], "mup.role_lr.output must be greater than 0, got -1"),
        (["mup.factors.mlp.lr=0"], "mup.factors.mlp.lr must be greater than 0, got 0"),
        (
            ["mup.factors={'*.mlp.*': {weight_decay: -1}}"],
            "mup.factors.*.mlp.*.weight_decay must be at least 0, got -1",
        ),
        (["mup.factors.mlp.lrr=2"], "mup.factors.mlp.lrr: unknown key"),
        (["mup.factors.mlp=2"], "mup.factors.mlp: "),
        (["optim.warmup_steps=20"], "optim.warmup_steps 20 must be less than train.steps 20"),
        (["optim.schedule=wsd"], "optim.decay_steps goes with optim.schedule wsd"),
        (["optim.decay_steps=5"], "optim.decay_steps goes with optim.schedule wsd"),
        (["optim.schedule=wsd", "optim.decay_steps=19"], "optim.decay_steps 19 overlap in train.steps 20"),
        (["optim.betas=[0.9, 1]"], "optim.betas must lie in [0, 1)"),
        (["optim.muon.lr=0.01"], "optim.muon.lr would do nothing under optim.kind adamw: set that to muon, or leave"),
        (["optim.muon={steps: 6, include: [skip]}"], "optim.muon.steps, optim.muon.include would do nothing"),
        (["optim.kind=muon", "parallel.engine=zero"], "optim.kind muon needs parallel.engine fsdp2"),
        (["optim.kind=muon", "optim.muon.momentum=1"], "optim.muon.momentum must be at least 0 and less than 1, got 1"),
        (["ema.decays=[]"], "ema.decays must be different numbers between 0 and 1"),
        (["ema.decays=[0.9, 1.0]"], "ema.decays must be different numbers between 0 and 1"),
        (["ema.decays=[0.9, 0.9]"], "ema.decays must be different numbers between 0 and 1"),
        (
            ["objective.kind=ddpm", "objective.predict=x"],
            "objective.predict x needs objective.kind rectified_flow, not ddpm: leave it velocity",
        ),
        (
            ["objective.kind=ddpm", "objective.uniform_share=0.1"],
            "objective.uniform_share 0.1 needs objective.kind rectified_flow, not ddpm: leave it 0.0",
        ),
        (
            ["objective.kind=ddpm", "objective.contrastive_weight=0.05"],
            "objective.contrastive_weight 0.05 needs objective.kind rectified_flow, not ddpm: leave it 0.0",
        ),
        (["objective.x_clamp=0.1"], "objective.x_clamp 0.1 does nothing without objective.predict x"),
        (
            ["objective.contrastive_weight=0.05", "train.global_batch_size=7"],
            "train.global_batch_size 7 is odd, and objective.contrastive_weight compares the samples of a batch in "
            "pairs: set it to 8",
        ),
        (["objective.contrastive_weight=1"], "objective.contrastive_weight must be at least 0 and less than 1, got 1"),
        (["run.allow_change=[optim.lrr]"], '"optim.lrr" is no config key; did you mean "optim.lr"?'),
        (["run.allow_change=[train.seed]"], '"train.seed" is what the run is'),
    ],
)
def test_conflicts(overrides: list[str], problem: str) -> None:
    assert problem in message(*overrides)


def test_sizes_of_images_are_in_pixels_of_the_autoencoder() -> None:
    changes = ["model.micro_conditions=true", "model.width=96", "mup.base_width=48", "model.pixels_per_latent=8"]
    said = r"model\.pixels_per_latent 8 is not autoencoder\.downsample 1, .*: set it to 1$"
    with pytest.raises(ConfigError, match=said):
        load_config("pixart_debug_mup", changes)
    load_config("pixart_debug_mup", [*changes[:-1], "model.pixels_per_latent=1"])
    load_config("pixart_debug_mup", ["model.pixels_per_latent=8"])  # which is then unused


def test_a_base_width_that_the_model_refuses() -> None:
    changes = ["model.micro_conditions=true", "model.head_dim=64", "model.width=384", "mup.base_width=256"]
    with pytest.raises(ConfigError, match=r"mup\.base_width 256 makes no model: .*multiple of 3"):
        load_config("pixart_0.04b_mup", changes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["text_encoder.path=none"],  # of precomputed shards; others are refused when they are opened
        ["autoencoder.downsample=2"],
        ["optim.schedule=wsd", "optim.decay_steps=18"],
        ["optim.warmup_steps=19"],
        ["run.allow_change=[optim.lr, train.steps]"],
        ["optim.kind=muon", "optim.muon.lr=0.01", "run.allow_change=[optim.muon.lr]"],
        ["optim.muon.momentum=0.95"],
    ],
)
def test_no_conflict(overrides: list[str]) -> None:
    load_config(DEBUG, overrides)


def test_unknown_key_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data:\n  sources:\n    - {shards: a.tar, wieght: 2}\n")
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.wieght: unknown key$"):
        load_config(str(path))


def test_all_conflicts_at_once() -> None:
    text = message("data.resolution=30", "mup.base_width=40", "optim.schedule=wsd", "ema.decays=[]")
    assert all(key in text for key in ("data.resolution", "mup.base_width", "optim.decay_steps", "ema.decays"))


def test_frozen() -> None:
    config: Any = load_config(DEBUG)
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0
    for section, key in (("model", "width"), ("data", "flip"), ("text_encoder", "width"), ("autoencoder", "channels")):
        with pytest.raises(AttributeError):
            setattr(getattr(config, section), key, 1)


# ------------------------------------------------------------------------------------------------------------- resume
def resumed(*overrides: str) -> list[str]:
    return check_resume(plain(load_config(DEBUG)), load_config(DEBUG, overrides), 4)


def test_a_factor_of_1_is_no_change_on_resume() -> None:
    assert resumed("mup.factors.attention.lr=1") == []
    with pytest.raises(ConfigError, match=r"mup\.factors\.attention\.lr: None in the checkpoint, 1\.5 now"):
        resumed("mup.factors.attention.lr=1.5")


def test_resume_unchanged() -> None:
    assert resumed() == []


@pytest.mark.parametrize(
    "override",
    [
        *("train.seed=1", "model.depth=3", "data.flip=0.5", "text_encoder.dropout=0.2", "mup.parametrization=sp"),
        *("mup.base_depth=4", "mup.output_multiplier=2.0", "mup.role_lr.hidden=2.0", "optim.kind=muon"),
        "mup.factors.attention.lr=2.0",
    ],
)
def test_resume_refuses_identity(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        resumed(override, "train.log_every=7")
    text = str(error.value)
    assert f"{key}: " in text
    assert f"{value} now; it is part of what the run is" in text
    assert "log_every" not in text


def test_role_factors_agree_with_the_roles() -> None:
    config = load_config(DEBUG, ["mup.role_lr={hidden: 2, vector: 0.5}"])
    assert config.mup.role_lr.model_dump() == {role: {"hidden": 2.0, "vector": 0.5}.get(role, 1.0) for role in ROLES}
    assert build_mup_table(config).settings.role_lr == {"hidden": 2.0, "vector": 0.5}


def test_resume_asks_for_schedule_keys() -> None:
    with pytest.raises(ConfigError) as error:
        resumed("optim.lr=1e-3", "train.steps=30", "train.seed=1", "run.allow_change=[train.steps]")
    text = str(error.value)
    assert "optim.lr: 0.004 in the checkpoint, 0.001 now\n" in text
    assert "add 'run.allow_change=[train.steps,optim.lr]'\n" in text, "ready to paste, with what was allowed before"
    assert "train.seed" in text, "all at once"
    assert "train.steps: " not in text
    assert resumed("optim.lr=1e-3", "train.steps=30", "run.allow_change=[optim.lr, train.steps]") == [
        "optim.lr: 0.004 -> 0.001",
        "train.steps: 20 -> 30",
    ]


def test_resume_lets_runtime_through() -> None:
    changes = resumed("train.log_every=7", "run.dir=elsewhere", "data.shards=moved/*.tar", "parallel.shard=1")
    assert changes == [
        f"data.shards: {load_config(DEBUG).data.shards} -> moved/*.tar",
        "parallel.shard: 0 -> 1",
        "train.log_every: 1 -> 7",
    ]


# ------------------------------------------------------------------------------------------------------------ resolve
@pytest.mark.parametrize(
    ("micro", "resolution", "world", "rows"),
    [
        ("null", 32, 1, 8),  # the whole share
        ("null", 32, 3, 3),  # of the largest rank
        ("0.03125", 32, 1, 2),  # a count at 256 squared: 64 times as many at 32 squared
        ("0.03125", 16, 1, 8),
        ("0.0001", 32, 1, 1),  # at least one
        ("4", 32, 2, 4),  # no more than the share
    ],
)
def test_micro_batch_rows(micro: str, resolution: int, world: int, rows: int) -> None:
    config = load_config(DEBUG, [f"train.micro_batch_size={micro}", f"data.resolution={resolution}"])
    assert resolve(config, world).micro_batch_rows == rows


@pytest.mark.parametrize(("resolution", "rows"), [(256, 49), (224, 64), (512, 12), (1024, 3)])
def test_micro_batch_rows_of_large_images(resolution: int, rows: int) -> None:
    """224: 49 x (8 / 7) squared, which rounding in another order makes 63."""
    config = load_config("mmdit_0.18b_mup", ["train.micro_batch_size=49", f"data.resolution={resolution}"])
    assert resolve(config, 2).micro_batch_rows == rows


def test_world_size() -> None:
    config = load_config(DEBUG)
    assert resolve(config, 8).micro_batch_rows == 1
    with pytest.raises(ConfigError, match=r"9 processes need train\.global_batch_size of at least as many, got 8"):
        resolve(config, 9)


def test_shard() -> None:
    assert resolve(load_config(DEBUG), 6).shard == 6
    config = load_config(DEBUG, ["parallel.shard=2"])
    assert resolve(config, 6).shard == 2
    with pytest.raises(ConfigError, match=r"parallel\.shard 2 does not divide the 3 processes"):
        resolve(config, 3)


def test_time_shift() -> None:
    config = load_config("mmdit_18b_mup")
    assert resolve(config, 1).time_shift == 1.0  # 256 px: 16 x 16 tokens, the base
    assert resolve(load_config("mmdit_18b_mup", ["data.resolution=512"]), 1).time_shift == 2.0
    proxy = load_config("mmdit_0.18b_mup")
    assert resolve(proxy, 1).time_shift == resolve(config, 1).time_shift, "proxy and target share it"
    shifted = load_config(DEBUG, ["objective.shift_base_tokens=32"])
    assert resolve(shifted, 1).time_shift == pytest.approx(math.sqrt(2))


# -------------------------------------------------------------------------------------------------------- written out
@pytest.mark.slow
def test_schema_is_up_to_date() -> None:
    """`make schema` writes it; editors read it."""
    root = CONFIG_DIR.parent
    done = subprocess.run(
        [sys.executable, "-m", "trainer.config.schema"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == (CONFIG_DIR / "schema.json").read_text(), "run `make schema`"


@pytest.mark.slow
def test_needs_no_torch() -> None:
    code = "import sys, trainer.config.load as c; c.load_config('mmdit_18b_mup'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIG_DIR.parent, check=False, timeout=60).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_written_config_loads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path), ["optim.eps=2e-12", "optim.lr=1e-5", "optim.clip_norm=null", "wandb.project=off"])
    text = to_yaml(config)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert parse(yaml.safe_load(text), "any YAML reader") == config
    assert plain(config) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.precision=fp64", "parallel.shard=1", "parallel.reshard_after_forward=false",
        "parallel.cpu_offload=true", "optim.spike_threshold=4", "train.rollback_after=3",
    ],
)  # fmt: skip
def test_zero_refuses_what_it_cannot_do(override: str) -> None:
    """By the key's name and what to do, and only under zero."""
    load_config("mmdit_debug_mup.yaml", [override])
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}.*(fsdp2|zero_stage)"):
        load_config("mmdit_debug_mup.yaml", [override, "parallel.engine=zero"])


@pytest.mark.parametrize(
    ("config", "overrides", "problem"),
    [
        ("pixart", ["attention=cudnn"], "attention cudnn does not fit model.kind pixart: its gradients are NaN"),
        ("dit", ["attention=cudnn"], "attention cudnn does not fit model.kind dit"),
        ("mmdit", ["attention=cudnn", "precision=fp32"], "attention cudnn does not compute in parallel.precision fp32"),
        ("uvit", ["attention=varlen", "precision=fp32"], "attention varlen does not compute .* fp32: leave it auto"),
        ("mmdit", ["attention=efficient", "precision=fp64"], "attention efficient does not compute .* fp64"),
    ],
)
def test_attention_kernels_that_are_wrong_for_the_run(config: str, overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.{problem}"):
        load_config(f"{config}_debug_mup.yaml", [f"parallel.{override}" for override in overrides])


def test_cudnn_needs_the_norms_that_a_key_takes_away() -> None:
    with pytest.raises(ConfigError, match=r"attention cudnn does not fit model\.qk_norm false: its gradients"):
        load_config("mmdit_debug_mup.yaml", ["parallel.attention=cudnn", "model.qk_norm=false"])


def test_attention_kernels_that_can_be_right() -> None:
    for overrides in (["attention=cudnn"], ["attention=efficient", "precision=fp32"], ["precision=fp64"]):
        load_config("mmdit_debug_mup.yaml", [f"parallel.{override}" for override in overrides])
