"""From a study to the target's YAML: which values, by which rules, with which warnings and refusals."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.studies import fill, search
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.search.lr_fit import fit_of
from trainer.search.report import completed
from trainer.search.study import Study
from trainer.search.transfer import Choice, write_target

TARGET = """extends: mmdit_debug_mup.yaml
train: {steps: 80, global_batch_size: 16}
model: {width: 128, depth: 4}
optim: {weight_decay: 0.1, betas: [0.9, 0.99]}
data: {resolution: 16}
"""


def best_lr(study: Study) -> float:
    return float(completed(study)[0].point["optim.lr"] or 0)


def test_transfer(study: Study, tmp_path: Path) -> None:
    target, output = tmp_path / "target.yaml", tmp_path / "new" / "found.yaml"
    target.write_text(TARGET)
    said = "\n".join(write_target(study, str(target), output))
    best = completed(study)[0]
    config = load_config(str(output))
    assert config.optim.lr == fitted_lr(study)
    assert config.optim.clip_norm == best.point["optim.clip_norm"]
    assert list(config.optim.betas) in ([0.9, 0.95], [0.9, 0.99])
    assert (config.train.steps, config.model.width) == (80, 128)
    text = output.read_text()
    for part in (
        str(study.folder),
        f"trial: {best.number},",
        "commit: abc",
        "sha256 def",
        "table of the target: sha256",
    ):
        assert part in text, part
    for warning in (
        "horizon: 20 steps (160 images) in the proxy, 80 (1.28e+03) in the target",
        "batch: 8 in the proxy, 16 in the target",
        "depth: 2 in the proxy, 4 in the target",
        "time shift: 1 in the proxy, 0.5 in the target",
        "data.resolution: 32 in the proxy, 16 in the target: the data differ",
    ):
        assert f"warning: {warning}" in said, warning
        assert f"# warning: {warning}" in text
    assert "optim.betas" not in "".join(line for line in said.splitlines() if line.startswith("warning")), "searched"
    assert config.optim.weight_decay == 0.1, "without rules what was not searched is the target's"
    assert "--rules completed-p" in said


MUON_SPACE = {
    "optim.muon.lr": {"log_uniform": [1e-3, 1e-1]},
    "optim.muon.momentum": {"choices": [0.9, 0.95, 0.98]},
    "mup.factors.attention.lr": {"log_uniform": [0.25, 4]},
    "mup.factors.mlp.init": {"log_uniform": [0.5, 2]},
}


def test_transfer_of_muon_and_of_kinds_of_module(tmp_path: Path) -> None:
    found = Study.open(search(tmp_path, "optim.kind=muon", space=MUON_SPACE, trials=6))
    fill(found, lambda point: 0.2 + float(point["mup.factors.attention.lr"] or 0))
    target, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    target.write_text(RULED + "mup: {factors: {time: {lr: 2}}}\n")
    with pytest.raises(ConfigError, match=r"optim\.kind: muon in the proxy, adamw in "):
        write_target(found, str(target), output)
    target.write_text(target.read_text().replace("optim: {", "optim: {kind: muon, "))
    said = write_target(found, str(target), output)
    config, best = load_config(str(output)), completed(found)[0].point
    assert config.optim.muon.lr == best["optim.muon.lr"]
    assert config.optim.muon.momentum == best["optim.muon.momentum"]
    factors = {key: given.model_dump() for key, given in config.mup.factors.items()}
    assert factors == {
        "time": {"lr": 2.0, "weight_decay": 1.0, "init": 1.0},
        "attention": {"lr": best["mup.factors.attention.lr"], "weight_decay": 1.0, "init": 1.0},
        "mlp": {"lr": 1.0, "weight_decay": 1.0, "init": best["mup.factors.mlp.init"]},
    }
    told = [line for line in said if "mup.factors" in line and "was not searched" in line]
    assert len(told) == 1, "what is 1 differs from nothing"
    assert "mup.factors.time.lr: None in the proxy, 2.0 in the target, and it was not searched" in told[0]
    with pytest.raises(ConfigError, match=r"no rule is known for Muon's: .* --rules none"):
        write_target(found, str(target), output, Choice(rules="completed-p"))


def test_transfer_leaves_what_the_target_is_made_of(study: Study, tmp_path: Path) -> None:
    """Even where it may write over a file: else the target and its parent would extend each other."""
    parent, target = tmp_path / "parent.yaml", tmp_path / "target.yaml"
    parent.write_text(TARGET)
    target.write_text("extends: parent.yaml\n")
    for output, message in ((target, "is the target, which the new config extends"), (parent, "extends itself")):
        with pytest.raises(ConfigError, match=message):
            write_target(study, str(target), output)
    assert (parent.read_text(), target.read_text()) == (TARGET, "extends: parent.yaml\n")


@pytest.mark.parametrize(("key", "before", "after"), [("uniform_share", 0.0, 0.1), ("contrastive_weight", 0.0, 0.05)])
def test_another_objective_is_refused(key: str, before: float, after: float, study: Study, tmp_path: Path) -> None:
    target = tmp_path / "target.yaml"
    target.write_text(RULED + f"objective: {{{key}: {after}}}\n")
    with pytest.raises(ConfigError, match=rf"objective\.{key}: {before} in the proxy, {after} in "):
        write_target(study, str(target), tmp_path / "found.yaml")


# --------------------------------------------------------------------------------------------------------------- rules
RULED = "extends: mmdit_debug_mup.yaml\nmodel: {width: 128}\noptim: {weight_decay: 0.1}\n"


def test_the_rules_write_four_values_together(study: Study, tmp_path: Path) -> None:
    """Twice the batch and four times the steps of the proxy: r = 1/4."""
    target, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    target.write_text(RULED + "train: {steps: 80, global_batch_size: 16}\n")
    write_target(study, str(target), output)
    before = load_config(str(output)).optim
    said = "\n".join(write_target(study, str(target), output, Choice(rules="completed-p")))
    text, after = output.read_text(), load_config(str(output)).optim
    assert after.lr == pytest.approx(before.lr / 2, rel=1e-3)
    assert after.betas == pytest.approx([1 - (1 - beta) / 4 for beta in before.betas])
    assert after.eps == pytest.approx(2 * before.eps)
    assert after.weight_decay == pytest.approx(0.05)
    assert 80 * after.lr * after.weight_decay == pytest.approx(20 * before.lr * 0.1, rel=1e-3), (
        "the whole run decays alike"
    )
    for part in (
        f"lr: {after.lr} # completed-p (r = 0.25): {before.lr:.4g} x sqrt(r)",
        "weight_decay: 0.05 # completed-p (r = 0.25): 0.1 x sqrt(r), times lr in AdamW; the proxy's own",
        "eps: 2e-12 # completed-p",
        f"betas: [{after.betas[0]}, {after.betas[1]}] # completed-p (r = 0.25): 1 - beta x r, from [",
        "# completed-p: batch x 2, steps x 4, images x 8, so r = 0.25; tested for batches of 0.125 to 4 times",
    ):
        assert part in text, part
    assert "horizon:" not in said
    assert "batch:" not in said.replace("completed-p: batch", "")
    assert "forced" not in text


def test_the_square_root_rule_says_nothing_of_a_longer_run(study: Study, tmp_path: Path) -> None:
    target, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    target.write_text(RULED + "train: {steps: 80}\n")
    said = "\n".join(write_target(study, str(target), output, Choice(rules="sqrt-batch")))
    assert load_config(str(output)).optim.lr == fitted_lr(study)
    assert "warning: horizon: 20 steps" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("train: {global_batch_size: 64}", "the batch is 8 times the proxy's, tested are 0.125 to 4 times"),
        ("model: {width: 1088}", "the width is 17 times the proxy's, tested are factors up to 16"),
        ("model: {depth: 4}", "the depth is 2 in the proxy and 4 in the target, without the rule for it"),
        ("model: {depth: 66}\nmup: {base_depth: 2}", "the depth is 33 times the proxy's, tested are factors up to 32"),
    ],
)
def test_outside_their_range_the_rules_are_refused_unless_forced(
    target: str, why: str, study: Study, tmp_path: Path
) -> None:
    path, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    path.write_text(f"extends: mmdit_debug_mup.yaml\n{target}\n")
    with pytest.raises(ConfigError) as caught:
        write_target(study, str(path), output, Choice(rules="completed-p"))
    assert why in str(caught.value)
    assert "--force-rules" in str(caught.value)
    assert not output.exists()
    said = write_target(study, str(path), output, Choice(rules="completed-p", force=True))
    assert f"forced: {why}" in "\n".join(said)
    text = output.read_text()
    assert f"# forced: {why}" in text
    assert text.count(" # forced, completed-p (r = ") == 4, "each value says so"


def test_within_their_range_depth_transfers_by_its_rule(study: Study, tmp_path: Path) -> None:
    path, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    path.write_text(
        "extends: mmdit_debug_mup.yaml\nmodel: {depth: 4}\nmup: {base_depth: 2}\noptim: {weight_decay: 0.1}\n"
    )
    said = "\n".join(write_target(study, str(path), output, Choice(rules="completed-p")))
    assert "warning" not in said, "the proxy's own depth is the base"


def test_a_beta_that_no_run_has_is_refused_with_numbers(study: Study, tmp_path: Path) -> None:
    path, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    path.write_text("extends: mmdit_debug_mup.yaml\ntrain: {steps: 1}\noptim: {warmup_steps: 0}\n")
    warm = next(t.number for t in completed(study) if t.point["optim.warmup_steps"] == 0)
    with pytest.raises(
        ConfigError, match=r"1 - beta1 = 0\.1 times r = 20 is 2, and beta1 = -1 does not lie in \[0, 1\)"
    ):
        write_target(study, str(path), output, Choice(warm, rules="completed-p", force=True))


def test_force_without_rules_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--force-rules has nothing to force"):
        write_target(study, "mmdit_debug_mup.yaml", tmp_path / "found.yaml", Choice(force=True))


# -------------------------------------------------------------------------------------------- the learning rate's value
def fitted_lr(study: Study) -> float:
    fit = fit_of(study.search.space, completed(study))
    assert fit is not None
    assert fit.region is not None
    return float(f"{fit.region.value:.4g}")


def test_the_fit_is_written_or_the_best_trial(study: Study, tmp_path: Path) -> None:
    output = tmp_path / "found.yaml"
    fitted, best = fitted_lr(study), best_lr(study)
    assert fitted != best
    for choice, expected in ((None, fitted), ("fit", fitted), ("best", best)):
        value: Any = choice
        write_target(study, "mmdit_debug_mup.yaml", output, Choice(value=value))
        assert load_config(str(output)).optim.lr == expected
    with pytest.raises(ConfigError, match="--value fit is of all trials, and --trial chooses one"):
        write_target(study, "mmdit_debug_mup.yaml", output, Choice(completed(study)[0].number, "fit"))


@pytest.mark.slow
def test_where_the_loss_falls_to_the_end_the_best_trial_is_taken_and_said(tmp_path: Path) -> None:
    chance = random.Random(0)
    small = Study.open(search(tmp_path, trials=20, space={"optim.lr": {"log_uniform": [1e-4, 1e-2]}}))
    fill(small, lambda p: 0.5 - 10 * float(p["optim.lr"] or 0) + chance.gauss(0, 0.001))
    output = tmp_path / "found.yaml"
    said = "\n".join(write_target(small, "mmdit_debug_mup.yaml", output))
    assert load_config(str(output)).optim.lr == best_lr(small)
    assert "because there is no minimum of a fit: its 95 % interval reaches the upper end" in said
    assert "widen the range of optim.lr" in said
    with pytest.raises(ConfigError, match="use --value best, where trial"):
        write_target(small, "mmdit_debug_mup.yaml", output, Choice(value="fit"))
    fixed = Study.open(search(tmp_path / "b", trials=2, space={"optim.clip_norm": {"choices": [0.3, 1.0]}}))
    fill(fixed, lambda p: float(p["optim.clip_norm"] or 0))
    with pytest.raises(ConfigError, match=r"--value fit needs a search over optim\.lr"):
        write_target(fixed, "mmdit_debug_mup.yaml", output, Choice(value="fit"))


# ------------------------------------------------------------------------------------------------ warnings and refusals
def test_equal_runs_give_no_warning(study: Study, tmp_path: Path) -> None:
    target = tmp_path / "target.yaml"
    target.write_text("extends: mmdit_debug_mup.yaml\nmodel: {width: 128}\noptim: {weight_decay: 0.1}\n")
    [fit, line] = write_target(study, str(target), tmp_path / "found.yaml")
    assert fit.startswith("optim.lr: ")
    assert "found.yaml: " in line


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mup: {base_width: 64}", "mup.base_width: 32 in the proxy, 64 in"),
        ("mup: {parametrization: sp}", "mup.parametrization: mup in the proxy, sp in"),
        ("train: {steps: 5}", "optim.warmup_steps"),
    ],
)
def test_targets_that_do_not_fit(target: str, message: str, study: Study, tmp_path: Path) -> None:
    path, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    path.write_text(f"extends: mmdit_debug_mup.yaml\n{target}\n")
    warm = next(
        t.number for t in study.trials() if t.value and t.value < 0.3 and int(t.point["optim.warmup_steps"] or 0) > 5
    )
    with pytest.raises(ConfigError) as caught:
        write_target(study, str(path), output, Choice(warm))
    assert message in str(caught.value)
    assert not output.exists()


def test_a_trial_by_number(study: Study, tmp_path: Path) -> None:
    second = sorted(t.value for t in study.trials() if t.value is not None)[1]
    number = next(t.number for t in study.trials() if t.value == second)
    write_target(study, "mmdit_debug_mup.yaml", tmp_path / "found.yaml", Choice(number))
    assert f"trial: {number}, val_loss_ema {second:.6g}, chosen by hand" in (tmp_path / "found.yaml").read_text()
    with pytest.raises(ConfigError, match="trial 99 is none of the finished ones"):
        write_target(study, "mmdit_debug_mup.yaml", tmp_path / "other.yaml", Choice(99))
