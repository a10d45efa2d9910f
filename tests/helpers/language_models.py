"""Small language models with random weights, and a byte-level BPE tokenizer with Qwen's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

# As Qwen3's, without tools: the system text if there is one, and an empty thought where thinking is turned off.
QWEN_CHAT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# As Gemma's, which has no system message.
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + m.role + '\\n' + (m.content | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_WORDS = [
    "a photograph of the old city at night, seen from the river; two dogs running through snow",
    "<|im_start|>user\n<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture",
    "a red apple on a table. Describe the scene: User Prompt: a blue ball\n\na green cross on a black background",
]
_SPECIAL = ("<pad>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tokenizer(ends: str = "", chat: str | None = QWEN_CHAT, side: str = "right") -> Any:
    """A byte-level BPE tokenizer. ends: "eos" or "bos", which it adds to texts."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=list(_SPECIAL), initial_alphabet=alphabet)
    core.train_from_iterator(_WORDS * 4, trainer)
    marks = {"eos": ("$A </s>", [("</s>", 1)]), "bos": ("<bos> $A", [("<bos>", 2)])}
    if ends:
        single, special = marks[ends]
        core.post_processor = TemplateProcessing(single=single, special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<bos>",
        additional_special_tokens=list(_SPECIAL[3:]),
        padding_side=side,
    )
    made.chat_template = chat
    return made


def _saved(model: Any, tok: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def save(kind: str, folder: Path, **options: Any) -> Path:
    """Save a model of a kind, of width 32 (T5: 96), and its tokenizer. options: of the tokenizer."""
    tok = tokenizer(**options)
    sizes: dict[str, Any] = _SIZES | {"vocab_size": len(tok), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        if kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
        elif kind == "qwen2_5_vl":
            rope: Any = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
            vision: Any = {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 32,
            }
            config = Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rope}, vision_config=vision)
            model = Qwen2_5_VLForConditionalGeneration(config)
        elif kind == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, sliding_window=8))
        elif kind == "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8))
        elif kind == "t5gemma":
            part: Any = sizes | {"head_dim": 8, "sliding_window": 8}
            model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part, vocab_size=len(tok)))
        elif kind == "t5":
            model = T5EncoderModel(
                T5Config(vocab_size=len(tok), d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
            )
        elif kind == "umt5":
            config = UMT5Config(vocab_size=len(tok), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
            model = UMT5ForConditionalGeneration(config)
        else:
            assert kind == "clip", kind
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
            clip: Any = {name: sizes[name] for name in names} | {"max_position_embeddings": 77, "projection_dim": 24}
            model = CLIPTextModelWithProjection(CLIPTextConfig(**clip, eos_token_id=1, pad_token_id=0))
    # Weights of the usual size, so that layers change the states by more than rounding.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.2)
    return _saved(model, tok, folder)


def save_sd3(folder: Path) -> Path:
    """Stable Diffusion 3's encoders and tokenizers, as its pipeline keeps them: two CLIPs, the second with other
    weights, and a wider T5."""
    for name, kind in (("text_encoder", "clip"), ("text_encoder_2", "clip"), ("text_encoder_3", "t5")):
        save(kind, folder / name, ends="eos")
        beside = folder / name.replace("text_encoder", "tokenizer")
        AutoTokenizer.from_pretrained(folder / name, trust_remote_code=False).save_pretrained(beside)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", trust_remote_code=False)
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.5)
    second.save_pretrained(folder / "text_encoder_2")
    return folder


def sd3_overrides(folder: Path, options: str = "") -> list[str]:
    """A config with the encoders of save_sd3, of 44 tokens of 96 features and pooled vectors of 48. options: more keys
    of each encoder."""
    clip = "max_length: 20, width: 32, layers: [-2], pooled_width: 24" + options
    more = (
        f"{{path: {folder}, subfolder: text_encoder_2, {clip}, join: features}}, "
        f"{{path: {folder}, subfolder: text_encoder_3, max_length: 24, width: 96{options}}}"
    )
    return [f"text_encoder={{path: {folder}, subfolder: text_encoder, {clip}, more: [{more}]}}"]
