"""Frozen text encoders of transformers: captions become states, with a mask of their tokens."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    MT5EncoderModel,
    T5EncoderModel,
    T5GemmaEncoderModel,
    UMT5EncoderModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..config import NONE, TextModelConfig
from ..errors import DataError
from .loading import fingerprint_of, freeze, load_error, quieten, weights_digest
from .template import Template, template_of
from .weights import load_whole

# Of an encoder-decoder only the encoder is loaded; every other kind of model is loaded whole by AutoModel.
_ENCODERS: dict[str, Any] = {
    "t5": T5EncoderModel,
    "mt5": MT5EncoderModel,
    "umt5": UMT5EncoderModel,
    "t5gemma": T5GemmaEncoderModel,
}
# fmt: off
_TEXT_FIELDS = (
    "model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
    "max_position_embeddings", "layer_norm_epsilon", "layer_norm_eps",
)
# What else makes the states of a model with rotary positions; the fingerprints of other models do not hold these names.
_ROTARY_FIELDS = (
    "rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window", "layer_types",
    "query_pre_attn_scalar", "attn_logit_softcapping", "hidden_activation", "use_bidirectional_attention",
)
# fmt: on
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "vocab.txt")
_CAPTIONS = ("a red apple on a table", "two dogs running through snow", "the old city at night, seen from the river")
_PROBE_TEXT = "The 2 quick brown foxes; \u00b5 'caf\u00e9' \u732b"  # tells tokenizers apart


Encoded: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""States [b, L, D] with zeros past a caption's end, their mask bool [b, L], pooled vectors [b, P], where P may be 0."""


class TextEncoder:
    """A frozen Hugging Face text encoder.

    model: is called with input_ids and attention_mask. tokenizer: of Hugging Face. width: D, the features of a
    state. max_length: L, the most tokens per caption. fingerprint: identifies weights, tokenizer and template, whatever
    their path. weights: their digest (see weights_digest).
    lockstep: the model is sharded over ranks, so every call must run it equally often, whatever the captions are.
    template: the text around captions. layers: whose states are taken, as TextEncoderConfig.layers. pooled_width: P,
    the features of the pooled vector, where one is taken; else 0. pad: whether padding is seen, as
    TextEncoderConfig.pad.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        width: int,
        max_length: int,
        fingerprint: str,
        template: Template | None = None,
        layers: Sequence[int] = (),
        pooled_width: int = 0,
        pad: bool = False,
    ) -> None:
        self.model = model
        self.template, self.layers, self.pooled_width, self.pad = template, layers, pooled_width, pad
        # A language model would keep its keys and values for the tokens that follow, of which there are none.
        keeps = "use_cache" in inspect.signature(model.forward).parameters
        self._options = ({"output_hidden_states": True} if layers else {}) | ({"use_cache": False} if keeps else {})
        self.width, self.max_length, self.fingerprint = width, max_length, fingerprint
        self.weights: str | None = None
        self.lockstep = False
        self.tokenizer = tokenizer
        self._empty: Encoded | None = None

    @property
    def parts(self) -> tuple[TextEncoder, ...]:
        """Itself, as JoinedTextEncoder.parts are several."""
        return (self,)

    def mark_sharded(self) -> None:
        """To be called once the model is sharded over ranks: see lockstep."""
        self.lockstep = True
        # transformers finds what a model can record (hidden states) by the name of its class, which sharding changes.
        for module in self.model.modules():
            if (recorded := getattr(module, "_can_record_outputs", None)) is not None:
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), recorded)

    def encode(self, captions: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """b captions -> (states [b, L, D] in the encoder's dtype, zeros past a caption's end; mask bool [b, L]).

        length: L, where it is less than max_length. Equal captions are encoded once, and the empty caption once for the
        whole run. Nothing waits for the device.
        """
        states, mask, _ = self.encode_pooled(captions, length)
        return states, mask

    @torch.no_grad()
    def encode_pooled(self, captions: list[str], length: int | None = None) -> Encoded:
        """As encode, and the pooled vectors [b, P]."""
        length = length or self.max_length
        if self._empty is None:
            self._empty = self._encode([""], self.max_length)
        distinct = [c for c in dict.fromkeys(captions) if c]
        parts = [(self._empty[0][:, :length], self._empty[1][:, :length], self._empty[2])]
        if next(self.model.parameters()).dtype == torch.float64:
            # T5 computes its norms and softmax in fp32, where the padding of a batch changes the last bits (by 1e-8).
            # Captions are encoded one by one, so that a caption's states do not depend on the others of the batch.
            unused = [""] * (len(captions) - len(distinct)) if self.lockstep else []
            parts += [self._encode([c], length) for c in [*distinct, *unused]]
        elif distinct or self.lockstep:
            parts.append(self._encode(distinct or [""], length))
        states, mask, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # [1 + distinct, L, ...]
        row_of = {"": 0} | {caption: row for row, caption in enumerate(distinct, 1)}
        rows = torch.tensor([row_of[c] for c in captions]).to(states.device, non_blocking=True)
        return states[rows], mask[rows], pooled[rows]

    def _encode(self, captions: list[str], length: int) -> Encoded:
        """n captions -> (states [n, L, D], mask [n, L], pooled vectors [n, P]), from one forward pass at the longest
        true length, of at most L = `length` tokens."""
        device = next(self.model.parameters()).device
        ids, mask, kept = self._tokens(captions, length)
        mask = mask.to(device, non_blocking=True)
        found = self.model(input_ids=ids.to(device, non_blocking=True), attention_mask=mask, **self._options)
        if self.layers and found.hidden_states is None:
            raise DataError(
                f"text_encoder.layers: {type(self.model).__name__} records no hidden states: leave it empty"
            )
        layers = [found.hidden_states[layer] for layer in self.layers] or [found.last_hidden_state]
        states = torch.cat(layers, -1)  # [n, longest, D]
        if kept is not None:
            kept = kept.to(device, non_blocking=True)
            states = torch.take_along_dim(states, kept[..., None].clamp(min=0), 1)  # [n, most kept, D]
            mask = kept >= 0
        states = states.masked_fill(mask[..., None] == 0, 0.0)[:, :length]
        mask = mask.bool()[:, :length]
        missing = length - mask.shape[1]
        if self.pooled_width:
            pooled = found.text_embeds if "text_embeds" in found else found.pooler_output  # [n, P]
        else:
            pooled = states.new_empty(len(captions), 0)
        return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing)), pooled

    def _tokens(self, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """n captions -> (ids [n, longest], their mask, which of the tokens become states [n, most kept]: -1 behind a
        caption's last; None where all do). Padding stands at the right: so a causal model sees nothing of it."""
        if self.template is None:
            tokens = self.tokenizer(
                captions,
                padding="max_length" if self.pad else "longest",
                padding_side="right",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            return ids, torch.ones_like(mask) if self.pad else mask, None
        rows = self.template.tokens(captions, length)
        start = len(self.template.first)
        # The last token before the caption stands for a caption without tokens.
        kept = [list(range(start, len(row))) or [start - 1] for row in rows]
        return (
            _padded(rows, self.tokenizer.pad_token_id),
            _padded([[1] * len(row) for row in rows], 0),
            _padded(kept, -1),
        )

    def save(self, model_folder: Path, tokenizer_folder: Path) -> None:
        """Write model and tokenizer in the form that from_pretrained reads, of transformers 4 as well."""
        self.model.save_pretrained(model_folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(tokenizer_folder)
        path = tokenizer_folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        if isinstance(
            settings.get("extra_special_tokens"), list
        ):  # whose name in transformers 4, which 5 reads too, is
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
            path.write_text(json.dumps(settings, indent=2) + "\n")


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def tokenizer_subfolder(cfg: TextModelConfig) -> str | None:
    """The tokenizer's folder: a diffusers pipeline keeps the tokenizer of text_encoder_3 in tokenizer_3."""
    return cfg.subfolder.replace("text_encoder", "tokenizer") if cfg.subfolder else None


def stored_text_encoder(cfg: TextModelConfig) -> tuple[str | None, torch.dtype]:
    """(the class of transformers that loads the encoder, None where it is a part of a model of text and images; the
    dtype of its stored weights), from its config alone. Raises DataError where that cannot be read."""
    try:
        config = AutoConfig.from_pretrained(
            cfg.path, trust_remote_code=False, **({"subfolder": cfg.subfolder} if cfg.subfolder else {})
        )
    except Exception as error:  # a config.json of wrong types raises errors of the library's own
        raise load_error("text_encoder.path", cfg.path, cfg.subfolder, error) from error
    whole = getattr(_encoder_config(config), "hidden_size", None) is not None
    return _model_class(cfg, config).__name__ if whole else None, getattr(config, "dtype", None) or torch.float32


def _mask_unseen(*sizes: Any, **options: Any) -> torch.Tensor:
    """transformers' mask, but never left out where no token is masked: finding that out would wait for the device."""
    return eager_mask(*sizes, **options | {"allow_is_bidirectional_skip": False})


def load_text_encoder(
    cfg: TextModelConfig, device: torch.device | str, dtype: torch.dtype, shapes_only: bool = False
) -> TextEncoder:
    """Load the encoder of a T5 model, or any other Hugging Face encoder, from safetensors alone.

    shapes_only: read no weights; the model is on the meta device then and has no fingerprint.
    Raises DataError where the encoder cannot be loaded, its width is not that of the config, or it has fewer positions
    than text_encoder.max_length.
    """
    if cfg.path == NONE:
        raise DataError("text_encoder.path is 'none': give the folder or hub id of a text encoder")
    quieten()
    try:
        config = _text_config(cfg)
        model = _load_model(cfg, config, dtype, shapes_only)
        tokenizer = load_tokenizer(cfg)
    except DataError:
        raise
    except Exception as error:  # a config.json or a tokenizer that is damaged raises errors of any kind
        raise load_error("text_encoder.path", cfg.path, cfg.subfolder, error) from error
    template = template_of(cfg, tokenizer)
    _check_fits(cfg, config, template)
    freeze(model, "meta" if shapes_only else device)
    encoder = TextEncoder(
        model, tokenizer, cfg.width, cfg.max_length, "", template, cfg.layers, cfg.pooled_width, cfg.pad
    )
    if not shapes_only:
        _check_states(cfg, encoder)
        encoder.fingerprint = _fingerprint(cfg, config, encoder)
        encoder.weights = weights_digest(model, cfg.path, cfg.subfolder)
    return encoder


def _text_config(cfg: TextModelConfig) -> Any:
    """The config of transformers; of a model of text and images (Qwen2.5-VL, Gemma 3) that of its language model."""
    where = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
    config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=False, **where)
    if config.model_type == "t5gemma":
        config.is_encoder_decoder = False  # its encoder alone asks for it
    elif getattr(config, "hidden_size", None) is None and type(own := config.get_text_config()) in MODEL_MAPPING:
        config = own
    if getattr(_encoder_config(config), "hidden_size", None) is None:
        raise DataError(
            f"text_encoder.path: {cfg.path!r} is a {config.model_type}, not a text encoder alone: name the folder "
            "of one (its config.json has a hidden_size)"
        )
    return config


def _encoder_config(config: Any) -> Any:
    return config.encoder if config.model_type == "t5gemma" else config


def _check_fits(cfg: TextModelConfig, config: Any, template: Template | None) -> None:
    """Raise DataError where text_encoder.layers, width or max_length do not fit the model. config: its own."""
    config = _encoder_config(config)
    hidden, layers = config.hidden_size, getattr(config, "num_hidden_layers", 0)
    if wrong := [layer for layer in cfg.layers if not -layers - 1 <= layer <= layers]:
        raise DataError(
            f"text_encoder.layers: {cfg.path!r} has no layer {wrong[0]}: its states are numbered 0 to {layers}, or "
            f"-1 to {-layers - 1} from the end"
        )
    width = hidden * max(1, len(cfg.layers))
    if width != cfg.width:
        of = f" ({len(cfg.layers)} layers of {hidden})" if len(cfg.layers) > 1 else ""
        raise DataError(f"text_encoder.width is {cfg.width}, but {cfg.path!r} has width {width}{of}: set it to {width}")
    _check_pooled(cfg, config)
    longest = getattr(config, "max_position_embeddings", None)
    room = None if longest is None else longest - (len(template.first) if template else 0)
    if room is not None and cfg.max_length > room:
        cut = f", of which the text before a caption takes {longest - room}" if longest != room else ""
        raise DataError(
            f"text_encoder.max_length is {cfg.max_length}, but {cfg.path!r} has {longest} positions{cut}: set at most "
            f"{'that' if longest == room else room}"
        )


def _model_class(cfg: TextModelConfig, config: Any) -> Any:
    """config: of the model. CLIP's pooled vector is projected, where its own class projects it."""
    projects = "CLIPTextModelWithProjection" in (getattr(config, "architectures", None) or ())
    if cfg.pooled_width and config.model_type == "clip_text_model" and projects:
        return CLIPTextModelWithProjection
    return _ENCODERS.get(config.model_type, AutoModel)


def _check_pooled(cfg: TextModelConfig, config: Any) -> None:
    """Raise DataError where text_encoder.pooled_width is not that of the model."""
    if not cfg.pooled_width:
        return
    if config.model_type != "clip_text_model":
        raise DataError(
            f"text_encoder.pooled_width is {cfg.pooled_width}, but {cfg.path!r} is a {config.model_type}, and the text "
            "encoder of CLIP alone has a pooled vector that is trained: set it to 0"
        )
    projected = _model_class(cfg, config) is CLIPTextModelWithProjection
    width = config.projection_dim if projected else config.hidden_size
    if width != cfg.pooled_width:
        raise DataError(
            f"text_encoder.pooled_width is {cfg.pooled_width}, but {cfg.path!r} has {width}: set it to {width}"
        )


def _fingerprint(cfg: TextModelConfig, config: Any, encoder: TextEncoder) -> str:
    """What a default leaves as it was before there were prefixes, chats and layers is not in it."""
    probe: Any = encoder.tokenizer(_PROBE_TEXT)["input_ids"]
    more: dict[str, Any] = {"layers": list(cfg.layers)} if cfg.layers else {}
    more |= {"pad": [encoder.tokenizer.pad_token_id, encoder.max_length]} if cfg.pad else {}
    more |= {"pooled": type(encoder.model).__name__} if cfg.pooled_width else {}
    if encoder.template is not None:
        more |= {"first": encoder.template.first, "last": encoder.template.last}
    said = _encoder_config(config).to_dict()
    if "rope_parameters" in said:
        more["rotary"] = {name: said.get(name) for name in _ROTARY_FIELDS}
    return fingerprint_of(config.to_dict(), _TEXT_FIELDS, encoder.model, [probe, more] if more else probe)


def _load_model(cfg: TextModelConfig, config: Any, dtype: torch.dtype, shapes_only: bool) -> Any:
    """The model of transformers. config: its own."""
    model_class = _model_class(cfg, config)
    ALL_MASK_ATTENTION_FUNCTIONS.register("eager", _mask_unseen)
    kind: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if not shapes_only:
        kind |= {"use_safetensors": True, "config": config}
        return load_whole(model_class, "text_encoder.path", cfg.path, cfg.subfolder, **kind)
    with torch.device("meta"):
        if model_class is AutoModel:
            return AutoModel.from_config(config, trust_remote_code=False, **kind)
        return model_class._from_config(config, **kind)


def load_tokenizer(cfg: TextModelConfig) -> Any:
    """The tokenizer of a text encoder. Raises DataError where it cannot be loaded, or knows no English."""
    quieten()
    path, where = _tokenizer_place(cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
    except Exception as error:  # a tokenizer that is damaged raises errors of any kind
        raise load_error("text_encoder.path", cfg.path, cfg.subfolder, error) from error
    _check_tokens(cfg, tokenizer)
    if tokenizer.pad_token_id is None:  # of some language models; it is masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _tokenizer_place(cfg: TextModelConfig) -> tuple[str, dict[str, str]]:
    """(path, options) of the tokenizer. A folder text_encoder of a pipeline, named without the pipeline, has its
    tokenizer beside it."""
    if subfolder := tokenizer_subfolder(cfg):
        return cfg.path, {"subfolder": subfolder}
    folder = Path(cfg.path)
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES) and beside.is_dir():
        return str(beside), {}
    return cfg.path, {}


def _check_tokens(cfg: TextModelConfig, tokenizer: Any) -> None:
    """Raise DataError where the tokenizer does not tell captions apart: without its files transformers makes one that
    knows no word, and says nothing."""
    ids = [tokenizer(caption)["input_ids"] for caption in _CAPTIONS]
    flat = [number for row in ids for number in row]
    unknown = 0 if tokenizer.unk_token_id is None else flat.count(tokenizer.unk_token_id)
    if len({tuple(row) for row in ids}) < len(ids) or 4 * unknown > len(flat):
        path, where = _tokenizer_place(cfg)
        raise DataError(
            f"text_encoder.path: the tokenizer at {'/'.join([path, *where.values()])!r} knows {len(flat) - unknown} of "
            f"{len(flat)} tokens of plain English captions: put the tokenizer's files there (a pipeline keeps those of "
            "its folder text_encoder_3 in tokenizer_3)"
        )
    if cfg.chat is None and not cfg.prefix and not tokenizer("")["input_ids"]:
        raise DataError(
            f"text_encoder.path: the tokenizer of {cfg.path!r} makes no token of the empty caption, for which there "
            "would be no state: set text_encoder.chat or text_encoder.prefix, as such language models are used"
        )


def _check_states(cfg: TextModelConfig, encoder: TextEncoder) -> None:
    """Raise DataError where the states of captions are not finite, or do not tell them apart."""
    behind = 0 if encoder.template is None else len(encoder.template.last)
    states, mask, pooled = encoder._encode(
        list(_CAPTIONS), 32 + behind
    )  # not encode, which would keep the empty caption's
    means = (states.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [3, D]
    told = (means, pooled) if encoder.pooled_width else (means,)
    if not all(each.isfinite().all() and len(each.unique(dim=0)) == len(each) for each in told):
        raise DataError(
            f"text_encoder.path: {cfg.path!r} gives states that are not finite, or the same for different captions, in "
            f"{encoder.model.dtype}: its weights are damaged, or need another parallel.precision"
        )


def token_counts(cfg: TextModelConfig) -> Callable[[list[str]], list[int]] | None:
    """A function that counts the tokens of captions, which are not cut; None where text_encoder.path is none."""
    if cfg.path == NONE:
        return None
    tokenizer = load_tokenizer(cfg)
    if (template := template_of(cfg, tokenizer)) is not None:
        return lambda captions: [len(ids) - len(template.first) for ids in template.tokens(captions, 1 << 30)]
    return lambda captions: [len(ids) for ids in tokenizer(captions, verbose=False)["input_ids"]]
