"""Language models as text encoders: their states are those of the library's own call, without the template's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma2Model,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
    T5GemmaForConditionalGeneration,
    UMT5EncoderModel,
)

from data.config import TextEncoderConfig
from data.encoders.text import TextEncoder, load_text_encoder, token_counts
from data.errors import DataError
from tests.helpers.host_sync import NoWait
from tests.helpers.language_models import GEMMA_CHAT, save
from trainer.config.load import parse
from trainer.errors import ConfigError

KINDS = ("qwen3", "qwen2_5_vl", "gemma2", "gemma3", "t5gemma", "umt5")
ENDS = {"umt5": "eos", "gemma2": "bos", "gemma3": "bos", "t5gemma": "bos"}
CAPTIONS = ["a red apple on a table", "", "two dogs running through snow, seen from the river", "7"]
SYSTEM = "Describe the image by detailing the color, shape, size, texture."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save(kind, folder / kind, ends=ENDS.get(kind, ""), side="left" if kind == "qwen3" else "right")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> TextEncoder:
    width = 32 * max(1, len(options.get("layers", ())))
    return load_text_encoder(
        TextEncoderConfig(**{"path": str(folder), "width": width, "max_length": 96} | options), "cpu", dtype
    )


def assert_same(encoder: TextEncoder, theirs: Sequence[Tensor], first: int = 0) -> None:
    """States of CAPTIONS, left-aligned, are the library's [T, D] of each caption from its token `first` on."""
    states, mask = encoder.encode(CAPTIONS)
    assert states.shape[:2] == mask.shape == (len(CAPTIONS), encoder.max_length)
    assert (states[~mask] == 0).all()
    for row, own, wanted in zip(states, mask, theirs, strict=True):
        length = len(wanted) - first
        assert own.tolist() == [True] * length + [False] * (encoder.max_length - length)
        torch.testing.assert_close(row[:length], wanted[first:], atol=2e-5, rtol=2e-5)


def count(folder: Path, text: str, **options: Any) -> int:
    return len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text, **options)["input_ids"])


# ------------------------------------------------------------------------------------------- as the library's pipelines


@pytest.mark.slow
def test_as_qwen_image_encodes_prompts(models: Path) -> None:
    """Qwen2.5-VL, of which the language model alone is loaded; the pipeline cuts as many tokens as it is told."""
    folder = models / "qwen2_5_vl"
    before = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    pipeline: Any = SimpleNamespace(
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, trust_remote_code=False).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        tokenizer_max_length=512,
        prompt_template_encode=before + "{}<|im_end|>\n<|im_start|>assistant\n",
        prompt_template_encode_start_idx=count(folder, before),
        _extract_masked_hidden=lambda *given: QwenImagePipeline._extract_masked_hidden(pipeline, *given),
    )
    with torch.no_grad():
        theirs, mask = QwenImagePipeline._get_qwen_prompt_embeds(pipeline, CAPTIONS, torch.device("cpu"))
    encoder = load(folder, chat=SYSTEM, thinking=True)
    assert encoder.template is not None
    assert len(encoder.template.first) == pipeline.prompt_template_encode_start_idx > 10
    assert_same(encoder, [row[own.bool()] for row, own in zip(theirs, mask, strict=True)])


@pytest.mark.slow
def test_as_z_image_encodes_prompts(models: Path) -> None:
    """The layer before the last, no system text, thinking left on; the pipeline keeps the template's states."""
    folder = models / "qwen3"
    pipeline: Any = SimpleNamespace(
        text_encoder=Qwen3ForCausalLM.from_pretrained(folder, trust_remote_code=False).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    with torch.no_grad():
        theirs = ZImagePipeline._encode_prompt(pipeline, list(CAPTIONS), torch.device("cpu"))
    assert pipeline.tokenizer.padding_side == "left"
    assert_same(load(folder, chat="", thinking=True, layers=(-2,)), theirs, count(folder, "<|im_start|>user\n"))


def test_as_flux_2_klein_encodes_prompts(models: Path) -> None:
    """Three layers along the features, thinking off."""
    folder = models / "qwen3"
    model = Qwen3ForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = []
    for caption in CAPTIONS:
        chat = tok.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert "<think>\n\n</think>" in chat
        with torch.no_grad():
            found = Flux2KleinPipeline._get_qwen3_prompt_embeds(
                model, tok, caption, max_sequence_length=128, hidden_states_layers=[1, 2, 3]
            )
        theirs.append(found[0][-count(folder, chat) :])  # padded at the left
    assert_same(load(folder, chat="", layers=(1, 2, 3)), theirs, count(folder, "<|im_start|>user\n"))


def test_as_sana_encodes_prompts(models: Path) -> None:
    """Gemma 2 behind an instruction; the pipeline counts its tokens."""
    folder, instruction = models / "gemma2", "Describe the image by detailing the color.\nUser Prompt:"
    pipeline: Any = SimpleNamespace(
        text_encoder=Gemma2Model.from_pretrained(folder, trust_remote_code=False).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        _text_preprocessing=lambda prompts, clean_caption: prompts,
    )
    with torch.no_grad():
        theirs, mask = SanaPipeline._get_gemma_prompt_embeds(
            pipeline, CAPTIONS, torch.device("cpu"), torch.float32, False, 64, [*map(str, instruction.split("\n"))]
        )
    rows = [row[own.bool()] for row, own in zip(theirs, mask, strict=True)]
    first = count(folder, instruction)
    # The empty prompt has no token of its own: its state is that of the instruction's last.
    rows = [row if len(row) > first else torch.cat([row, row[-1:]]) for row in rows]
    assert_same(load(folder, prefix=instruction), rows, first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5gemma", "umt5"])
def test_encoders_of_encoder_decoders(kind: str, models: Path) -> None:
    folder = models / kind
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = (
        T5GemmaForConditionalGeneration.from_pretrained(folder, trust_remote_code=False).model.encoder
        if kind == "t5gemma"
        else UMT5EncoderModel.from_pretrained(folder, trust_remote_code=False)
    )
    tokens = tok(CAPTIONS, padding="max_length", max_length=96, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**tokens, output_hidden_states=True)
    rows = [row[own.bool()] for row, own in zip(found.last_hidden_state, tokens["attention_mask"], strict=True)]
    encoder = load(folder)
    assert_same(encoder, rows)
    assert sum(p.numel() for p in encoder.model.parameters()) == sum(p.numel() for p in model.parameters())
    rows = [row[own.bool()] for row, own in zip(found.hidden_states[-2], tokens["attention_mask"], strict=True)]
    assert_same(load(folder, layers=(-2,)), rows)


@pytest.mark.slow
def test_a_prefix_before_an_encoder_with_real_weights() -> None:
    """MiniLM, as retrieval models are used: what it writes before and behind the text is found as well."""
    folder = Path(".cache/minilm")
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    with torch.no_grad():
        texts = [tok(f"query: {caption}", return_tensors="pt") for caption in CAPTIONS]
        rows = [model(**text).last_hidden_state[0] for text in texts]
    encoder = load(folder, prefix="query: ", width=384)
    assert encoder.template is not None
    assert tok.convert_ids_to_tokens(encoder.template.first + encoder.template.last) == ["[CLS]", "query", ":", "[SEP]"]
    assert_same(encoder, rows, 3)


# -------------------------------------------------------------------------------------------------------------- padding

TEXTS: tuple[dict[str, Any], ...] = ({"prefix": "Describe the scene: "}, {"chat": SYSTEM, "layers": (-2, 1)})


@pytest.mark.slow
@pytest.mark.parametrize("options", TEXTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "umt5"])
def test_a_caption_does_not_depend_on_the_others(kind: str, options: dict[str, Any], models: Path) -> None:
    encoder = load(models / kind, **options)
    together, mask = encoder.encode(CAPTIONS)
    alone = [encoder.encode([caption]) for caption in CAPTIONS]
    torch.testing.assert_close(together, torch.cat([states for states, _ in alone]), atol=2e-5, rtol=2e-5)
    assert torch.equal(mask, torch.cat([own for _, own in alone]))
    exact = load(models / kind, torch.float64, **options)
    together, _ = exact.encode(CAPTIONS)
    assert torch.equal(together, torch.cat([exact.encode([caption])[0] for caption in CAPTIONS]))


@pytest.mark.slow
@pytest.mark.parametrize("options", TEXTS)
@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl", "gemma3", "t5gemma"])
def test_encoding_reads_nothing_back(kind: str, options: dict[str, Any], models: Path) -> None:
    encoder = load(models / kind, **options)
    encoder.encode([""])
    with NoWait():
        encoder.encode(CAPTIONS)
        encoder.encode(["one alone is not padded"])


def test_no_keys_and_values_are_kept(models: Path) -> None:
    encoder = load(models / "qwen3", chat=SYSTEM)
    with mock.patch.object(encoder.model, "forward", wraps=encoder.model.forward) as forward:
        encoder.encode(["a red apple"])
    assert all(call.kwargs["use_cache"] is False for call in forward.call_args_list)


# ----------------------------------------------------------------------------------------------------- prefix and chat


def test_the_caption_is_cut_and_never_the_template(models: Path) -> None:
    encoder = load(models / "qwen3", chat=SYSTEM, max_length=40)
    template = encoder.template
    assert template is not None
    [ids] = template.tokens(["two dogs " * 100], 40)
    assert ids[: len(template.first)] == template.first
    assert ids[-len(template.last) :] == template.last
    assert len(ids) == len(template.first) + 40
    states, mask = encoder.encode(["two dogs " * 100, "two"])
    assert mask.sum(1).tolist() == [40, len(template.last) + len(encoder.tokenizer("two")["input_ids"])]
    longer, _ = load(models / "qwen3", chat=SYSTEM, max_length=60).encode(["two dogs " * 100])
    own = 40 - len(template.last)
    torch.testing.assert_close(states[:1, :own], longer[:, :own], atol=2e-5, rtol=2e-5)
    counts = token_counts(TextEncoderConfig(path=str(models / "qwen3"), chat=SYSTEM, width=32, max_length=40))
    assert counts is not None
    assert counts(["two", "two dogs " * 100]) == [
        mask[1].sum(),
        len(template.last) + count(models / "qwen3", "two dogs " * 100),
    ]


def test_the_empty_caption_has_a_state(models: Path) -> None:
    """Where nothing is written behind the caption, the last token before it stands for it."""
    encoder = load(models / "qwen3", prefix="a red apple")
    states, mask = encoder.encode(["", " on a table"])
    assert mask.sum(1).tolist() == [1, count(models / "qwen3", " on a table")]
    with torch.no_grad():
        ids = encoder.tokenizer("a red apple", return_tensors="pt")["input_ids"]
        wanted = encoder.model(input_ids=ids).last_hidden_state[0, -1]
    torch.testing.assert_close(states[0, 0], wanted, atol=2e-5, rtol=2e-5)
    with pytest.raises(DataError, match=r"makes no token of the empty caption, .*: set text_encoder.chat or"):
        load(models / "qwen3")


def test_a_caption_that_joins_the_template_stays_apart(models: Path) -> None:
    """As line breaks do that are one token for two."""
    encoder = load(models / "qwen3", prefix="a red app")
    template, caption = encoder.template, "le on a table"
    assert template is not None
    joined = encoder.tokenizer(template.before + caption)["input_ids"]
    assert joined[: len(template.first)] != template.first
    [ids] = template.tokens([caption], 96)
    assert ids == [*template.first, *encoder.tokenizer(caption)["input_ids"]]


@pytest.mark.slow
def test_fingerprint_holds_all_that_makes_the_states(models: Path, tmp_path: Path) -> None:
    folder = models / "qwen3"
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text().replace("user", "User"))
    turned = shutil.copytree(folder, tmp_path / "turned")
    config = json.loads((turned / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (turned / "config.json").write_text(json.dumps(config))
    prints = [
        load(folder, chat=SYSTEM).fingerprint,
        load(folder, chat=SYSTEM + " Briefly.").fingerprint,
        load(folder, chat=SYSTEM, thinking=True).fingerprint,
        load(folder, chat=SYSTEM, layers=(-1,)).fingerprint,
        load(folder, chat=SYSTEM, layers=(-2,)).fingerprint,
        load(folder, prefix=SYSTEM).fingerprint,
        load(turned, chat=SYSTEM).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load(other, chat=SYSTEM).fingerprint == prints[0]  # this template takes the role from the messages
    (other / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text().replace("assist", "Assist"))
    assert load(other, chat=SYSTEM).fingerprint not in prints
    assert load(folder, torch.bfloat16, chat=SYSTEM, max_length=50).fingerprint == prints[0]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.slow
def test_errors_name_key_and_remedy(models: Path, tmp_path: Path) -> None:
    folder = models / "qwen3"
    with pytest.raises(DataError, match=r"text_encoder\.width is 32, .* has width 64 \(2 layers of 32\): set it to 64"):
        load(folder, chat="", layers=(1, 2), width=32)
    for layer in (4, -5):
        with pytest.raises(DataError, match=rf"text_encoder\.layers: .* has no layer {layer}: .* 0 to 3, or -1 to -4"):
            load(folder, chat="", layers=(layer,))
    with pytest.raises(DataError, match=r"max_length is 5, but the chat template writes \d\d tokens behind"):
        load(folder, chat="", max_length=5)
    with pytest.raises(DataError, match=r"max_length is 510, .* 512 positions, of which the text .* set at most \d+"):
        load(folder, chat=SYSTEM, max_length=510)
    without = save("qwen3", tmp_path / "without", chat=None)
    with pytest.raises(DataError, match=r"text_encoder\.chat: the tokenizer of .* cannot write a chat"):
        load(without, chat="")
    gemma = save("gemma2", tmp_path / "gemma", ends="bos", chat=GEMMA_CHAT)
    with pytest.raises(DataError, match=r"cannot write a chat \('System role not supported'\).* set chat to \"\""):
        load(gemma, chat=SYSTEM)
    [ids] = load(gemma, chat="").template.tokens(["a red apple"], 64)  # type: ignore[union-attr] (it has a template)
    assert ids.count(2) == 1, "the template writes <bos>, and the tokenizer no second one"
    twice = save("qwen3", tmp_path / "twice", chat="{{ messages[0].content }} {{ messages[0].content }}")
    with pytest.raises(DataError, match="does not write the system text and then the caption once"):
        load(twice, chat="")
    silent = save("qwen3", tmp_path / "silent", chat="{{ messages[-1].content }} !")
    with pytest.raises(DataError, match="does not write the system text and then the caption once"):
        load(silent, chat=SYSTEM)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_tell_captions_apart_is_refused(kind: str, models: Path, tmp_path: Path) -> None:
    """As of T5: a tokenizer that knows no word, and weights of zeros."""
    options: dict[str, Any] = {} if kind in ENDS else {"chat": SYSTEM}
    folder = shutil.copytree(models / kind, tmp_path / kind)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"].items()
    tokenizer["model"] |= {"merges": [], "vocab": {piece: number for piece, number in pieces if piece.startswith("<")}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="tokens of plain English captions"):
        load(folder, **options)
    encoder = load(models / kind, **options)
    with torch.no_grad():
        for weight in encoder.model.parameters():
            weight.zero_()
    encoder.model.save_pretrained(folder)  # type: ignore[operator] (a model of transformers)
    shutil.copy(models / kind / "tokenizer.json", folder)
    with pytest.raises(DataError, match="the same for different captions"):
        load(folder, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"prefix": "a", "chat": ""}, "text_encoder.prefix and text_encoder.chat exclude each other"),
        ({"thinking": True}, "text_encoder.thinking does nothing without text_encoder.chat"),
    ],
)
def test_conflicts(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"text_encoder": text}, "test")
    with pytest.raises(ConfigError, match=r"data\.text_lengths does not go with text_encoder.chat"):
        parse({"text_encoder": {"chat": ""}, "data": {"text_lengths": [256]}}, "test")
