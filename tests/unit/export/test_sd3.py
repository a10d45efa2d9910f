"""Weights of Stable Diffusion 3.5's kind come in: QK-norm, the pooled vector of CLIP, states of three encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from models.backbone import build_model
from models.layers import PooledTextCondition
from tests.distributed.runs import weights
from tests.helpers.backbones import random_weights
from tests.helpers.exports import config_of, run_export
from trainer.build.engine import build_mup_table
from trainer.errors import CheckpointError
from trainer.mup.apply import apply_multipliers

CLIP = "max_length: 20, layers: [-2], pad: true"
TEXT = (
    "text_encoder.max_length=20", "text_encoder.width=32", "text_encoder.layers=[-2]", "text_encoder.pooled_width=24",
    "text_encoder.pad=true", "text_encoder.path=none",
    f"text_encoder.more=[{{{CLIP}, width: 32, pooled_width: 24, join: features}},"
    "{max_length: 24, width: 96, pad: true}]",
)  # fmt: skip
SHAPE = ("model.width=96", "mup.base_width=32", "model.depth=3")


def twin(**options: Any) -> Any:
    sizes: dict[str, Any] = {
        "sample_size": 32, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 6, "joint_attention_dim": 96, "caption_projection_dim": 96,
        "pooled_projection_dim": 48, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SD3Transformer2DModel(**sizes | options)
        random_weights(model, torch.float32)
    return model.eval()


@pytest.mark.slow
def test_weights_of_sd3_predict_as_in_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = twin()
    theirs.save_pretrained(tmp_path / "sd3" / "transformer")
    config = config_of("mmdit", *TEXT, *SHAPE)
    command = ("--config", "mmdit_debug_mup.yaml", "--output", tmp_path / "back", *TEXT, *SHAPE)
    run_export(monkeypatch, "--import", tmp_path / "sd3" / "transformer", *command)
    text = config.text_encoder
    assert (text.total_length, text.total_width, text.total_pooled) == (44, 96, 48)
    ours = build_model(config.model, 3, text.total_width, pooled_width=text.total_pooled)
    apply_multipliers(ours, build_mup_table(config))
    ours.load_state_dict(weights(tmp_path / "back"))
    torch.manual_seed(1)
    x, t, states, pooled = torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 44, 96), torch.randn(2, 48)
    with torch.no_grad():
        found, _ = ours(x, t, PooledTextCondition(states, torch.ones(2, 44, dtype=torch.bool), pooled))
        [wanted] = theirs(
            x, encoder_hidden_states=states, pooled_projections=pooled, timestep=1000 * t, return_dict=False
        )
        [other] = theirs(
            x, encoder_hidden_states=states, pooled_projections=-pooled, timestep=1000 * t, return_dict=False
        )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - other).abs().max() > 0.01, "the pooled vector is read"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": None}, r"missing: transformer_blocks\.0\.attn\.norm_q\.weight"),  # Stable Diffusion 3 medium
        ({"dual_attention_layers": (0,)}, r"unknown: transformer_blocks\.0\.attn2"),  # 3.5 medium
        ({"pooled_projection_dim": 47}, r"shape: time_text_embed\.text_embedder\.linear_1\.weight is \[96, 47\]"),
    ],
)
def test_other_shapes_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin(**options).save_pretrained(tmp_path / "transformer")
    command = ("--config", "mmdit_debug_mup.yaml", "--output", tmp_path / "back", *TEXT, *SHAPE)
    with pytest.raises((CheckpointError, SystemExit), match=message):
        run_export(monkeypatch, "--import", tmp_path / "transformer", *command)
