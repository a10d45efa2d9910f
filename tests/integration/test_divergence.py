"""A run that diverges ends as failed, keeps what is healthy, and goes on from there."""

import re
from pathlib import Path

from tests.faults.harness import status
from tests.helpers.forked import finished
from trainer.monitor.records import read_metrics

SETTINGS = (
    "train.log_every=1", "train.checkpoint_every=1", "train.validate_every=3", "train.sample_every=0",
    "validation.samples=8", "run.keep_last=1", "run.allow_change=[optim.lr, train.steps]",
)  # fmt: skip


def test_a_run_with_a_wrong_learning_rate(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        where = (f"run.dir={tmp_path}", "run.name=run")
        done = finished("launch/train.py", "--config", "mmdit_debug_mup.yaml", *where, *SETTINGS, *arguments)
        return done.returncode, done.stdout + done.stderr

    folder = tmp_path / "run"
    assert run("train.steps=6")[0] == 0
    # Step 7 is taken, and spoils the weights.
    code, said = run("train.steps=40", "optim.lr=1e30", "train.max_skipped_steps=5", "train.validate_every=0")
    assert code == 1
    assert "warning: the learning rate jumps from 0.004 to 1e+30" in said
    assert re.search(
        r"error: the last \d steps up to step \d+ were all skipped .* again from step_00000006: lower", said
    )
    assert "Traceback" not in said
    assert status(folder)["state"] == "failed"
    assert "were all skipped" in status(folder)["reason"]
    found = {path.name for path in (folder / "checkpoints").glob("step_*") if path.suffix != ".diverged"}
    assert found == {"step_00000006"}, "which was saved before the step that spoilt the weights"
    code, said = run("train.steps=9", "validation.samples=16")
    assert code == 0, said
    assert re.search(r"resuming \S+step_00000006", said)
    assert "warning: other validation samples from step 6 on" in said
    val_sets = {record["step"]: record["val_set"] for record in read_metrics(folder) if "val_set" in record}
    assert val_sets[0] == val_sets[3] == val_sets[6] != val_sets[9]
