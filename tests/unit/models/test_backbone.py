"""Kinds of module and declared projections, on every shipped config."""

from collections import defaultdict
from fnmatch import fnmatchcase

import pytest

from models.backbone import declarations, kinds
from models.registry import BACKBONES
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.yaml_files import CONFIG_DIR

CONFIGS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
KINDS = {"attention", "mlp", "modulation", "text", "image", "label", "time", "patch", "skip", "final"}
# U-ViT has its embeddings by its condition, and a time MLP or none; a fused route ends in a skip.
BY_CONFIG = {"uvit": {"text", "label", "time"}, "mmdit": {"skip"}, "dit": {"skip"}, "pixart": {"skip"}}


def named(config: str) -> dict[str, set[str]]:
    """The parameters of each kind."""
    loaded = load_config(f"{config}.yaml")
    names = build_mup_table(loaded).rows
    patterns = kinds(loaded.model).items()
    return {kind: {n for n in names if any(fnmatchcase(n, p) for p in of)} for kind, of in patterns}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_each_kind_names_parameters(config: str) -> None:
    kind = load_config(f"{config}.yaml").model.kind
    found = named(config)
    assert found.keys() <= KINDS
    assert {name for name, names in found.items() if not names} <= BY_CONFIG.get(kind, set())


@pytest.mark.slow
def test_each_pattern_names_parameters_of_some_config() -> None:
    """None is left from a name that is no more."""
    unused = {
        kind: {p for of in kinds(load_config(f"{kind}_debug_mup.yaml").model).values() for p in of}
        for kind in BACKBONES
    }
    more = (["model.time_mlp=true", "model.final_conv=true"], ["model.condition=text", "model.text_length=256"])
    variants = [load_config("uvit_debug_mup.yaml", overrides) for overrides in more]
    fused = ("model.route.share=0.5", "model.route.start=1", "model.route.end=2", "model.route.fuse=sprint")
    deeper = ("model.depth=4", "model.route.end=4")  # U-ViT's route ends as many blocks before the end as it begins
    variants += [
        load_config(f"{kind}_debug_mup.yaml", [*fused, "model.depth=3", *(deeper if kind == "uvit" else ())])
        for kind in BACKBONES
    ]
    for loaded in (*(load_config(f"{config}.yaml") for config in CONFIGS), *variants):
        names = build_mup_table(loaded).rows
        unused[loaded.model.kind] -= {p for p in unused[loaded.model.kind] if any(fnmatchcase(n, p) for n in names)}
    assert {kind: left for kind, left in unused.items() if left} == {}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_attention_mlp_and_modulation_are_all_that_blocks_have(config: str) -> None:
    """Every weight from width to width in a block is of one of them, but U-ViT's skips, which are their own kind."""
    found, table = named(config), build_mup_table(load_config(f"{config}.yaml"))
    inside = {name for name, row in table.rows.items() if row.role == "hidden" and "block" in name}
    assert inside
    by_name = defaultdict(set)
    for kind in ("attention", "mlp", "modulation", "skip"):
        for name in found.get(kind, set()) & inside:
            by_name[name].add(kind)
    assert {name: of for name, of in by_name.items() if len(of) > 1} == {}
    assert by_name.keys() == inside


@pytest.mark.parametrize("kind", BACKBONES)
def test_projections_are_those_of_heads(kind: str) -> None:
    """Their rows are whole heads: as many matrices of [width, fan_in] as there are letters in the layer's name."""
    config = load_config(f"{kind}_debug_mup.yaml")
    declared = declarations(config.model)
    found = {}
    for name in build_mup_table(config).rows:
        projections = next(d.projections for d in declared if fnmatchcase(name, d.pattern))
        if projections:
            found[name] = projections
    layers = {name: name.split(".")[-2] for name in build_mup_table(config).rows if name.endswith(".weight")}
    assert found == {name: len(layer) for name, layer in layers.items() if layer in ("q", "kv", "qkv")}
