"""Several text encoders side by side: Stable Diffusion 3's conditioning, and what is checked of each encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)

from data.config import MoreTextConfig, TextEncoderConfig
from data.encoders.joined import AnyTextEncoder, load_text_encoders
from data.errors import DataError
from tests.helpers.host_sync import NoWait
from tests.helpers.language_models import save, save_sd3, sd3_overrides, tokenizer
from tests.helpers.steps import built
from trainer.config.load import load_config, parse
from trainer.config.resume import check_resume
from trainer.errors import ConfigError
from trainer.estimate.report import encoder_bytes, text_encoder_flops
from trainer.loop import train_step

CAPTIONS = ["a red apple on a table", "", "two dogs running through snow, seen from the river", "7"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models"))


def sd3(folder: Path, t5_length: int = 24, pad: bool = False) -> TextEncoderConfig:
    clip: dict[str, Any] = {"path": str(folder), "max_length": 20, "width": 32, "layers": (-2,), "pooled_width": 24}
    clip["pad"] = pad
    t5: dict[str, Any] = {
        "path": str(folder),
        "subfolder": "text_encoder_3",
        "max_length": t5_length,
        "width": 96,
        "pad": pad,
    }
    return TextEncoderConfig(
        **clip,
        subfolder="text_encoder",
        more=(MoreTextConfig(**clip, subfolder="text_encoder_2", join="features"), MoreTextConfig(**t5)),
    )


def load(cfg: TextEncoderConfig, dtype: torch.dtype = torch.float32) -> AnyTextEncoder:
    return load_text_encoders(cfg, "cpu", dtype)


def test_the_sizes_of_stable_diffusion_3() -> None:
    """3 encoders: tokens of 77 and 256, features 768 + 1280 filled up to 4096, pooled 768 + 1280."""
    clip = {"max_length": 77, "layers": [-2]}
    text = {
        **clip, "width": 768, "pooled_width": 768,
        "more": [
            {**clip, "width": 1280, "pooled_width": 1280, "join": "features"},
            {"max_length": 256, "width": 4096},
        ],
    }  # fmt: skip
    found = parse({"text_encoder": text}, "test").text_encoder
    assert (found.total_length, found.total_width, found.total_pooled) == (333, 4096, 2048)
    assert (TextEncoderConfig().total_length, TextEncoderConfig().total_width) == (256, 4096)
    assert TextEncoderConfig().total_pooled == 0


@pytest.mark.slow
def test_as_stable_diffusion_3_encodes_prompts(models: Path) -> None:
    """With padding, which the pipeline does not mask, all that it gives; without, the tokens of a prompt whose
    own length the pipeline is told."""
    named: dict[str, Any] = {}
    for suffix, kind in (
        ("", CLIPTextModelWithProjection),
        ("_2", CLIPTextModelWithProjection),
        ("_3", T5EncoderModel),
    ):
        folder = models / f"text_encoder{suffix}"
        named[f"text_encoder{suffix}"] = kind.from_pretrained(folder, trust_remote_code=False).eval()
        named[f"tokenizer{suffix}"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pipeline: Any = SimpleNamespace(**named, tokenizer_max_length=20, _execution_device=CPU)
    for name in ("_get_clip_prompt_embeds", "_get_t5_prompt_embeds"):
        setattr(pipeline, name, getattr(StableDiffusion3Pipeline, name).__get__(pipeline))

    @torch.no_grad()
    def theirs(prompts: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        encode: Any = StableDiffusion3Pipeline.encode_prompt
        given = {"do_classifier_free_guidance": False, "max_sequence_length": length}
        found, _, pooled, _ = encode(pipeline, prompts, None, None, **given)
        return found, pooled

    padded, mask, pooled = load(sd3(models, pad=True)).encode_pooled(CAPTIONS)
    wanted, wanted_pooled = theirs(CAPTIONS, 24)
    assert mask.all()
    torch.testing.assert_close(padded, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(pooled, wanted_pooled, atol=2e-5, rtol=2e-5)

    states, mask, pooled = load(sd3(models)).encode_pooled(CAPTIONS)
    assert (states.shape, pooled.shape) == ((4, 44, 96), (4, 48))
    for caption, own, own_mask, vector in zip(CAPTIONS, states, mask, pooled, strict=True):
        tokens = len(named["tokenizer"](caption)["input_ids"])
        wanted, wanted_pooled = theirs(caption, tokens)
        assert own_mask.tolist() == [True] * (2 * tokens) + [False] * (44 - 2 * tokens)
        both = torch.cat([wanted[0, :tokens], wanted[0, 20:]])
        torch.testing.assert_close(own[: 2 * tokens], both, atol=2e-5, rtol=2e-5)
        assert (both[:tokens, 64:] == 0).all()
        torch.testing.assert_close(vector, wanted_pooled[0], atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_a_pooled_vector_beside_another_encoder(models: Path, tmp_path: Path) -> None:
    """As FLUX.1: tokens of T5, and of CLIP the pooled vector alone, which is not projected."""
    clip = CLIPTextModel.from_pretrained(models / "text_encoder", trust_remote_code=False).eval()
    clip.save_pretrained(tmp_path / "clip")
    tok = AutoTokenizer.from_pretrained(models / "text_encoder", trust_remote_code=False)
    tok.save_pretrained(tmp_path / "clip")
    more = MoreTextConfig(path=str(tmp_path / "clip"), max_length=20, width=32, pooled_width=32, join="none")
    t5 = TextEncoderConfig(path=str(models / "text_encoder_3"), max_length=24, width=96)
    joined = load(TextEncoderConfig(path=t5.path, max_length=24, width=96, more=(more,)))
    states, mask, pooled = joined.encode_pooled(CAPTIONS)
    alone, alone_mask = load(t5).encode(CAPTIONS)
    assert torch.equal(states, alone)
    assert torch.equal(mask, alone_mask)
    with torch.no_grad():
        tokens = tok(CAPTIONS, padding=True, return_tensors="pt")
        torch.testing.assert_close(pooled, clip(**tokens).pooler_output, atol=2e-5, rtol=2e-5)
    one = MoreTextConfig(path=more.path, max_length=20, width=32, pooled_width=24, join="none")
    wrong = TextEncoderConfig(path=t5.path, max_length=24, width=96, more=(one,))
    with pytest.raises(DataError, match=r"text_encoder\.more\.0\.pooled_width is 24, but .* has 32: set it to 32"):
        load(wrong)


@pytest.mark.slow
def test_the_text_half_of_a_whole_clip(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 400, "eos_token_id": 1, "pad_token_id": 0}
    model: Any = CLIPModel(
        CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16})
    ).eval()
    model.save_pretrained(tmp_path)
    tok = tokenizer(ends="eos")
    tok.save_pretrained(tmp_path)
    states, mask = load(TextEncoderConfig(path=str(tmp_path), max_length=24, width=32)).encode(CAPTIONS[:1])
    with torch.no_grad():
        wanted = model.text_model(**tok(CAPTIONS[:1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(states[:, : mask.sum()], wanted, atol=2e-5, rtol=2e-5)


def test_a_pooled_vector_that_tells_nothing_is_refused(models: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(models, tmp_path / "moved"))
    clip = CLIPTextModelWithProjection.from_pretrained(moved / "text_encoder_2", trust_remote_code=False)
    with torch.no_grad():
        clip.text_projection.weight.zero_()
    clip.save_pretrained(moved / "text_encoder_2")
    cfg = sd3(moved)
    with pytest.raises(DataError, match="states that are not finite, or the same for different captions"):
        load(cfg)


def test_a_caption_does_not_depend_on_the_others_and_nothing_is_read_back(models: Path) -> None:
    encoder = load(sd3(models))
    encoder.encode([""])
    with NoWait():
        together = encoder.encode_pooled(CAPTIONS)
    for part, alone in zip(
        together, zip(*map(encoder.encode_pooled, [[c] for c in CAPTIONS]), strict=True), strict=True
    ):
        torch.testing.assert_close(part, torch.cat(alone), atol=2e-5, rtol=2e-5)
    states, mask, _ = together
    assert (states[~mask] == 0).all()
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "padding follows the tokens"


@pytest.mark.slow
def test_fingerprint_and_weights_are_of_all_encoders(models: Path, tmp_path: Path) -> None:
    cfg = sd3(models)
    moved = Path(shutil.copytree(models, tmp_path / "moved"))
    encoder, same = load(cfg), load(sd3(moved), torch.bfloat16)
    assert (same.fingerprint, len(encoder.parts)) == (encoder.fingerprint, 3)
    other = TextEncoderConfig(
        path=cfg.path, subfolder="text_encoder", max_length=20, width=32, layers=(-2,), pooled_width=24,
        more=(cfg.more[0], MoreTextConfig(path=cfg.path, subfolder="text_encoder_2", max_length=20, width=32)),
    )  # fmt: skip
    assert load(other).fingerprint != encoder.fingerprint
    assert load(sd3(models, t5_length=25)).fingerprint != encoder.fingerprint
    assert load(sd3(models, pad=True)).fingerprint != encoder.fingerprint
    t5: Any = T5EncoderModel.from_pretrained(moved / "text_encoder_3", trust_remote_code=False)
    with torch.no_grad():
        t5.encoder.block[0].layer[0].SelfAttention.q.weight.view(-1)[100].neg_()
    t5.save_pretrained(moved / "text_encoder_3")
    flipped = load(sd3(moved))
    assert flipped.fingerprint == encoder.fingerprint
    assert flipped.weights != encoder.weights == load(sd3(models)).weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 95}, r"more\.0\.width is 95, but .* has width 96: set it to 96"),
        ({"pooled_width": 96}, r"more\.0\.pooled_width is 96, but .* is a t5, and the text encoder of CLIP alone"),
        ({"path": "gone"}, r"more\.0\.path: there is no folder 'gone"),
        ({"chat": ""}, r"more\.0\.chat: the tokenizer of .* cannot write a chat"),
    ],
)
def test_errors_name_the_encoder(options: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    save("t5", tmp_path / "t5", ends="eos", chat=None)
    more = MoreTextConfig(**{"path": str(tmp_path / "t5"), "max_length": 24, "width": 96} | options)
    cfg = TextEncoderConfig(path=str(models), subfolder="text_encoder", max_length=20, width=32, more=(more,))
    with pytest.raises(DataError, match=rf"^text_encoder\.{message}"):
        load(cfg)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"text_encoder": {"more": [{"prefix": "a", "chat": ""}]}},
            r"text_encoder\.more\.0\.prefix and text_encoder",
        ),
        (
            {"text_encoder": {"more": [{"path": "here"}]}},
            r"more\.0\.path is here and text_encoder\.path none: name all",
        ),
        (
            {"text_encoder": {"pad": True, "chat": ""}},
            r"text_encoder\.pad does not go with text_encoder\.prefix or chat",
        ),
        ({"text_encoder": {"pad": True}, "data": {"text_lengths": [256]}}, r"data\.text_lengths shortens the padding"),
        ({"text_encoder": {"more": [{"join": "none"}]}}, r"more\.0\.join is none and its pooled_width 0"),
        (
            {"text_encoder": {"pooled_width": 8}, "model": {"kind": "pixart"}},
            "needs a model that reads a pooled vector, and model.kind pixart",
        ),
        ({"text_encoder": {"more": [{}]}, "data": {"text_lengths": [256]}}, r"does not go with text_encoder\.more"),
        ({"text_encoder": {"more": [{"widht": 8}]}}, r"text_encoder\.more\.0\.widht"),
    ],
)
def test_conflicts(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(config, "test")


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["synthetic", ".cache/debug/train-000000.tar"])
def test_a_model_trains_on_them(shards: str, models: Path, tmp_path: Path) -> None:
    with built("mmdit_debug_mup.yaml", tmp_path, f"data.shards={shards}", *sd3_overrides(models)) as run:
        batches = run.batches()
        name = "pooled_embed.fc1.weight"
        assert run.engine.full(name).shape == (64, 48)
        assert run.engine.full("text_embed.weight").shape == (64, 96)
        before = run.engine.full(name).clone()
        train_step(run, next(batches))
        steps = [next(batches) for _ in range(3)]
        with NoWait():
            for step in steps:  # adaLN-zero: the third one is the first in which the conditioning learns
                run.state.step += 1
                train_step(run, step)
        assert not torch.equal(before, run.engine.full(name))


def test_the_estimate_counts_all_encoders(models: Path) -> None:
    config = load_config("mmdit_debug_mup.yaml", sd3_overrides(models))
    files = [models / name / "model.safetensors" for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    numbers = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert encoder_bytes(config)["text_encoder"] == 2 * sum(numbers)
    assert text_encoder_flops(config) == 2 * (20 * numbers[0] + 20 * numbers[1] + 24 * numbers[2])
    elsewhere = load_config("mmdit_debug_mup.yaml", sd3_overrides(Path("/elsewhere")))
    with pytest.raises(ConfigError, match=r"text_encoder\.path '/elsewhere' is no local folder"):
        encoder_bytes(elsewhere)


def test_a_run_goes_on_with_moved_encoders_alone(models: Path) -> None:
    config = load_config("mmdit_debug_mup.yaml", sd3_overrides(models))
    old = config.model_dump(mode="json")
    moved = load_config("mmdit_debug_mup.yaml", sd3_overrides(Path("/elsewhere")))
    assert [line.partition(":")[0] for line in check_resume(old, moved, 0)] == [
        "text_encoder.more.0.path", "text_encoder.more.1.path", "text_encoder.path",
    ]  # fmt: skip
    changed = [each.replace("join: features", "join: tokens") for each in sd3_overrides(models)]
    with pytest.raises(ConfigError, match=r"text_encoder\.more\.0\.join: features in the checkpoint, tokens now"):
        check_resume(old, load_config("mmdit_debug_mup.yaml", changed), 0)
    with pytest.raises(ConfigError, match=r"text_encoder\.more\.1\.width: 96 in the checkpoint, None now"):
        check_resume(old, load_config("mmdit_debug_mup.yaml", [*sd3_overrides(models), "text_encoder.more=[]"]), 0)
