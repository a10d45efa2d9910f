"""Answers to questions about images, by a frozen BLIP (Li et al., 2022) of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering

from data.encoders.loading import freeze, load_error, model_fingerprint, quieten
from data.encoders.weights import load_whole

from .embeddings import CLIP_PIXELS, normalised
from .inception import full_float32

_MOST_TOKENS = 10  # of an answer
_PROBE = "Is there a red Bicycle?"


class Blip:
    """fingerprint: identity of weights and tokenizer, whatever the path. float32 throughout."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        quieten()
        self._model: Any = load_whole(BlipForQuestionAnswering, "vqa", path, dtype=torch.float32)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # damaged files raise errors of any kind
            raise load_error("vqa", path, None, error) from None
        freeze(self._model, device)
        self._device = torch.device(device)
        config = self._model.config
        computed = [
            (part.hidden_act, part.num_attention_heads, part.layer_norm_eps)
            for part in (config.text_config, config.vision_config)
        ]
        self.fingerprint = model_fingerprint(self._model, [*computed, self._tokenizer(_PROBE)["input_ids"]])

    @torch.no_grad()
    @full_float32()
    def __call__(self, image: Tensor, questions: Sequence[str]) -> list[str]:
        """uint8 [H, W, 3] -> the likeliest answer to each question, word by word. The image is seen once; questions are
        read one by one, because the model's own code attends to the padding of a batch."""
        model, text = self._model, self._model.config.text_config
        pixels = normalised(image[None], model.config.vision_config.image_size, CLIP_PIXELS, self._device)
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        answers = []
        for question in questions:
            tokens = self._tokenizer(question, return_tensors="pt").to(self._device)
            read = model.text_encoder(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
            ).last_hidden_state
            said = model.text_decoder.generate(
                input_ids=torch.full((1, 1), text.bos_token_id, device=self._device),
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                encoder_hidden_states=read,
                encoder_attention_mask=torch.ones(read.shape[:2], dtype=torch.long, device=self._device),
                max_new_tokens=_MOST_TOKENS,
                do_sample=False,
                num_beams=1,
            )
            answers.append(self._tokenizer.decode(said[0], skip_special_tokens=True).strip())
        return answers
