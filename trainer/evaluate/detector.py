"""What GenEval's rules are asked about: objects by a Mask2Former, their colours by CLIP, on transformers' models."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerModel

from data.encoders.loading import model_fingerprint, quieten
from data.errors import DataError

from .clip import Clip
from .geneval import COLOURS, Box, Detection
from .inception import full_float32

SHORT, _LONG, _MULTIPLE = 800, 1333, 32  # pixels of the detector's input, as it was trained
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = 0x99  # behind a masked object
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
# Spellings of COCO's classes in published models, and those of GenEval's metadata.
_GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


class Segmenter(Mask2FormerForUniversalSegmentation):
    """Without the training loss that it would be built with: that needs scipy."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super(Mask2FormerForUniversalSegmentation, self).__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, len(config.id2label or {}) + 1)
        self.post_init()


class Detector:
    """Objects of images. fingerprint: identity of both models' weights, whatever the paths."""

    def __init__(self, path: str, clip: Clip, device: torch.device | str = "cpu") -> None:
        quieten()
        try:
            model: Any = Segmenter.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        except Exception as error:  # the libraries raise errors of any kind where a file is damaged
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"detector: {path!r} cannot be loaded ({reason}); give a folder with config.json and *.safetensors of "
                "a Mask2Former, or a hub id that this machine can reach"
            ) from None
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._clip = torch.device(device), clip
        labels = model.config.id2label
        self._names = [_GENEVAL_NAMES.get(labels[i], labels[i]) for i in range(len(labels))]
        self.fingerprint = model_fingerprint(model, self._names)
        self._colour_weights = cache(self._embed_colours)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise DataError where the detector does not know a class that the prompts ask for."""
        if unknown := sorted(set(names) - set(self._names)):
            raise DataError(
                f"detector: it has no class {json.dumps(unknown)[1:-1]}, which the prompts ask for; use a Mask2Former "
                "for COCO's instances"
            )

    @torch.no_grad()
    @full_float32()
    def __call__(self, image: Tensor) -> list[Detection]:
        """uint8 [H, W, 3] -> every query's likeliest classes with the boxes of their masks, as Mask2Former scores them:
        class probability times the mean probability within the mask."""
        height, width = image.shape[:2]
        output = self._model(pixel_values=self._pixels(image))
        classes = output.class_queries_logits[0].softmax(-1)[:, :-1]  # [queries, C], without "no object"
        count = classes.shape[1]
        best = classes.flatten().topk(min(100, classes.numel()))
        chosen = best.indices // count
        logits = F.interpolate(output.masks_queries_logits, self._padded(height, width), mode="bilinear")[0]
        rows, columns = self._size(height, width)
        logits = F.interpolate(logits[None, :, :rows, :columns], (height, width), mode="bilinear")[0]
        masks = logits > 0  # [queries, H, W]
        sure = (logits.sigmoid() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)
        scores = (best.values * sure[chosen]).tolist()
        detections = []
        for index, query, score in zip(best.indices.tolist(), chosen.tolist(), scores, strict=True):
            mask = masks[query]
            if mask.any():
                name = self._names[index % count]
                box = _box(mask)
                detections.append(
                    Detection(name, score, box, cache(lambda m=mask, b=box, n=name: self._colours(image, m, b, n)))
                )
        return detections

    def _size(self, height: int, width: int) -> tuple[int, int]:
        scale = min(SHORT / min(height, width), _LONG / max(height, width))
        return round(height * scale), round(width * scale)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._size(height, width)
        return -(-rows // _MULTIPLE) * _MULTIPLE, -(-columns // _MULTIPLE) * _MULTIPLE

    def _pixels(self, image: Tensor) -> Tensor:
        """[1, 3, h, w], normalised and padded with zeros at the bottom and at the right."""
        height, width = image.shape[:2]
        x = image.permute(2, 0, 1)[None].to(self._device).float()
        rows, columns = self._size(height, width)
        x = F.interpolate(x, (rows, columns), mode="bilinear", antialias=True) / 255
        mean, std = (torch.tensor(v, device=self._device)[:, None, None] for v in (_MEAN, _STD))
        padded = self._padded(height, width)
        return F.pad((x - mean) / std, (0, padded[1] - columns, 0, padded[0] - rows))

    def _colours(self, image: Tensor, mask: Tensor, box: Box, name: str) -> list[float]:
        """Probabilities of COLOURS for an object before grey."""
        left, top, right, bottom = (int(side) for side in box)
        crop = torch.where(mask.cpu()[..., None], image, torch.full_like(image, _GREY))[top:bottom, left:right]
        embedding = F.normalize(self._clip.images(crop[None]), dim=1)
        return (100 * embedding @ self._colour_weights(name).T).softmax(1)[0].tolist()

    def _embed_colours(self, name: str) -> Tensor:
        """[COLOURS, d]: the mean over the templates, each of length 1."""
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
        embeddings = F.normalize(self._clip.texts(texts), dim=1).unflatten(0, (len(COLOURS), len(_TEMPLATES)))
        return F.normalize(embeddings.mean(1), dim=1)


def _box(mask: Tensor) -> Box:
    """Of a mask [H, W] that is not empty; right and bottom are exclusive."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
