"""Configs and overrides that are broken or meant to harm: a config, or one short message at bounded cost."""

import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.redaction import printable
from tests.helpers.fuzz import OUTCOMES, READ, REFUSED, fuzz
from tests.helpers.paths import ROOT
from trainer.config.keys import leaf_keys
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.config.yaml_files import read
from trainer.errors import ConfigError

DEBUG = "mmdit_debug_mup"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n"
    for before, after in zip(string.ascii_lowercase, string.ascii_lowercase[1:], strict=False)
)
FUZZ = fuzz(150, deadline=20_000)  # ms: a hang, not a busy machine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "there are more than 20000 values (line"),
        ("k: &k " + "x" * 10**5 + "\nsample: {prompts: [" + "*k, " * 999 + "]}", "there are more than 20000 values"),
        ("\n".join(f"k{i}: 1" for i in range(30_000)), "there are more than 20000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "there are more than 20 levels"),
        ("a: &a [*a]", "a value holds itself by an alias"),
        (f"train: {{steps: {'9' * 5000}}}", "is no int"),
        ("train: {steps: !!int abc}", "'abc' is no int (line 1, column 16: 'train: {steps: !!int abc}')"),
        ("train: {steps: !!timestamp abc}", "'abc' is no timestamp"),
        ("train: {steps: !!bool abc}", "'abc' is no bool"),
        (f"train: {{? [{'x, ' * 5000}] : 1}}", "is no key"),
        (f'? {"x" * 10**5}\n: 1\nrun: {{"a\\e[2J\\nb": 1}}', r"run.a\x1b[2J\nb: unknown key"),
        ("x" * (1 << 21), "it has more than 1 MiB"),
        ("extends: " + "x" * 9999, "was found neither as a path"),
        ('extends: "a\\0b"', "was found neither as a path"),
        ("data:\n  shards: 'https://me:hunter2@host/" + "y" * 99, "https://***@host/yyy"),
        (
            "data: {shards: [https://me:hunter2@host/x]}",
            "data.shards holds a password, a token or a signed query ('https://***@host/x')",
        ),
        ("data: {'https://me:hunter2@host/x': 1}", "https://***@host/x: unknown key"),
    ],
    ids=range(17),
)
def test_one_short_message(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    told = str(error.value)
    assert said in told
    assert len(told) < 2000
    assert "hunter2" not in told
    assert printable(told) == told


def test_a_long_chain_of_files(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"c{number}.yaml").write_text(f"extends: c{number + 1}\n")
    (tmp_path / "c30.yaml").write_text(f"extends: {DEBUG}\n")
    with pytest.raises(ConfigError, match="chain of more than 20 files"):
        read(tmp_path / "c0.yaml")
    assert read(tmp_path / "c15.yaml")["model"]


def bounded(load: Callable[[], object]) -> None:
    told = ""
    try:
        load()
    except ConfigError as error:
        told = str(error)
    OUTCOMES[REFUSED if told else READ] += 1
    assert len(told) < 60_000
    assert printable(told) == told


SCRAPS = ["&a ", "*a", "<<: ", "!!int ", "!!set ", "? ", ": ", "- ", "[", "{", "}", "]", "|\n", "%YAML 1.9\n", "---\n",
          "\x00", "\ud800", "\x1b", "9" * 99, "1e999", ".nan", "~", "é", "'", '"', "extends: ", "\t", "#"]  # fmt: skip


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 4000), st.sampled_from(SCRAPS) | st.text(max_size=9)), max_size=8))
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, str]]) -> None:
    text = (ROOT / f"configs/{DEBUG}.yaml").read_text()
    for at, new in changes:
        at %= len(text)
        text = text[:at] + new + text[at + len(new) :]
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    bounded(lambda: load_config(str(path)))


KEYS = sorted(leaf_keys(TrainConfig, type(load_config(DEBUG).model)))
VALUES = st.sampled_from(
    ["0", "-1", "1e18", "9223372036854775807", "null", "[]", "{}", "[[1]]", "true", "x" * 999, ".inf", "{a: 1}", "''"]
)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES | st.sampled_from(SCRAPS) | st.text(max_size=9)), max_size=3))
def test_hostile_overrides(overrides: list[tuple[str, str]]) -> None:
    bounded(lambda: load_config(DEBUG, [f"{key}={value}" for key, value in overrides]))
