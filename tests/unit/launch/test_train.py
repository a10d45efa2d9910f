"""What train.py says before it trains."""

from launch.train import foreign_validation
from trainer.config.load import load_config


def test_validation_on_other_data_than_is_trained_on_is_told() -> None:
    demo, own = load_config("mmdit_demo_mup"), "data.shards=mine"
    assert foreign_validation(demo, ["--config", "mmdit_demo_mup", "optim.lr=1"]) is None
    assert "data.val_shards=null" in (foreign_validation(demo, [own]) or "")
    assert foreign_validation(demo, ["data.sources=[{shards: mine}]"])
    assert foreign_validation(demo, [own, "data.val_shards=theirs"]) is None
    assert foreign_validation(load_config("mmdit_2b_mup"), [own]) is None
