"""Images from a model that muDiT has trained; an exported folder carries this file as pipeline.py.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("a red apple").images[0].save("apple.png")

It samples as muDiT itself does: captions at their true length, the conditional and the unconditional prediction apart,
the schedule of training, and pixels where the model has no autoencoder. It imports diffusers, transformers and torch.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t, the scheduler's own timestep) -> the model's output [B, C or 2 C, h, w] in float32."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")


class LatentForm(NamedTuple):
    """What the model's latents are to an autoencoder: `patch` x `patch` of its own stacked as channels, a side of which
    makes `downsample` pixels, and then (z - shift) * scale; video: of one frame."""

    downsample: int
    scale: float | Tensor
    shift: float | Tensor
    patch: int = 1
    video: bool = False


def latent_form(vae: Any) -> LatentForm:
    """By the autoencoder's class, its config and its statistics, as in training."""
    config, name = vae.config, type(vae).__name__
    if name == "AutoencoderKLFlux2":
        std = (vae.bn.running_var.float() + vae.bn.eps).sqrt()[:, None, None]
        mean = vae.bn.running_mean.float()[:, None, None]
        return LatentForm(2 ** len(config.block_out_channels), 1 / std, mean, patch=2)
    blocks = {"AutoencoderDC": "encoder_block_out_channels", "AutoencoderKLQwenImage": "dim_mult"}
    downsample = 2 ** (len(config[blocks.get(name, "block_out_channels")]) - 1)
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[f"latents_{part}"]).flatten()[:, None, None] for part in ("mean", "std"))
        scale, shift = scale / std, mean
    return LatentForm(downsample, scale, shift, video=name == "AutoencoderKLQwenImage")


class Template(NamedTuple):
    """The text before and after a caption; first, last: its tokens there; special: whether the tokenizer adds its own
    marks to them."""

    before: str
    after: str
    first: list[int]
    last: list[int]
    special: bool

    def tokens(self, tokenizer: Any, captions: list[str], length: int) -> list[list[int]]:
        """The tokens of each caption in its template. The caption is cut, so that `length` are left behind `first`."""
        texts = [f"{self.before}{caption}{self.after}" for caption in captions]
        start, rows = len(self.first), []
        for caption, ids in zip(captions, tokenizer(texts, add_special_tokens=self.special)["input_ids"], strict=True):
            end = len(ids) - len(self.last)
            own = ids[start:end]
            if end < start or ids[:start] != self.first or ids[end:] != self.last:  # edges have become one token
                own = tokenizer(caption, add_special_tokens=False)["input_ids"]
            rows.append([*self.first, *own[: max(0, length - len(self.last))], *self.last])
        return rows


class TextForm(NamedTuple):
    """How a text encoder reads captions, as in training.

    max_length: the most tokens of a caption. layers: of hidden_states, whose states lie behind each other; empty takes
    the last one. pad: padding is seen. pooled: CLIP's pooled vector is taken. join: whether the states follow the
    "tokens" or the "features" of the encoder before, or are not taken ("none"). template: the fields of Template.
    source: [class of transformers, path or id, subfolder, the tokenizer's subfolder] of an encoder that lies elsewhere.
    """

    max_length: int
    layers: Sequence[int] = ()
    pad: bool = False
    pooled: bool = False
    join: str = "tokens"
    template: Sequence[Any] | None = None
    source: Sequence[str | None] | None = None

    def load(self) -> tuple[Any, Any]:
        """(text encoder, tokenizer) from its source."""
        assert self.source is not None
        class_name, path, subfolder, tokenizer_subfolder = self.source
        alone = {"is_encoder_decoder": False} if class_name == "T5GemmaEncoderModel" else {}
        model = getattr(transformers, str(class_name)).from_pretrained(
            path, subfolder=subfolder or "", trust_remote_code=False, **alone
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, subfolder=tokenizer_subfolder or "", trust_remote_code=False
        )
        if tokenizer.pad_token_id is None:  # it is masked, so that any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return model, tokenizer

    def encode(self, model: Any, tokenizer: Any, captions: list[str], device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, L, E], zero past a caption's end, their mask bool [B, L], pooled vectors [B, P or 0]."""
        ids, mask, kept = (each.to(device) for each in self._tokens(tokenizer, captions))
        options = {"output_hidden_states": True} if self.layers else {}
        if "use_cache" in inspect.signature(model.forward).parameters:
            options["use_cache"] = False
        found = model(input_ids=ids, attention_mask=mask, **options)
        layers = [found.hidden_states[layer] for layer in self.layers] or [found.last_hidden_state]
        states = torch.take_along_dim(torch.cat(layers, -1), kept[..., None].clamp(min=0), 1)
        pooled = states.new_empty(len(captions), 0)
        if self.pooled:
            pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        return states.masked_fill((kept < 0)[..., None], 0.0), kept >= 0, pooled

    def _tokens(self, tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [B, K], their mask, which of them have a state that is kept [B, L]: -1 behind a caption's last)."""
        if self.template is None:
            tokens = tokenizer(
                captions,
                padding="max_length" if self.pad else "longest",
                padding_side="right",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            mask = torch.ones_like(tokens["attention_mask"]) if self.pad else tokens["attention_mask"]
            places = torch.arange(mask.shape[1]).expand_as(mask)
            return tokens["input_ids"], mask, places.masked_fill(mask == 0, -1)
        template = Template(*self.template)
        rows, start = template.tokens(tokenizer, captions, self.max_length), len(template.first)
        # The last token before the caption stands for a caption without tokens.
        kept = [list(range(start, len(row))) or [start - 1] for row in rows]
        ones = [[1] * len(row) for row in rows]
        return _padded(rows, tokenizer.pad_token_id or 0), _padded(ones, 0), _padded(kept, -1)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _joined(blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """States and masks of several encoders behind each other; padding follows the tokens of all."""
    if len(blocks) == 1:
        return blocks[0]
    width = max(states.shape[-1] for states, _ in blocks)
    states = torch.cat([F.pad(each, (0, width - each.shape[-1])) for each, _ in blocks], 1)  # [B, L, E]
    mask = torch.cat([each for _, each in blocks], 1)
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)
    return torch.take_along_dim(states, order[..., None], 1), mask.gather(1, order)


def _along_features(states: Tensor, mask: Tensor, more: Tensor, more_mask: Tensor) -> tuple[Tensor, Tensor]:
    """States [B, K, E] and [B, M, F] -> [B, max(K, M), E + F], and their mask."""
    length = max(mask.shape[1], more_mask.shape[1])
    joined = [F.pad(each, (0, 0, 0, length - each.shape[1])) for each in (states, more)]
    masks = [F.pad(each, (0, length - each.shape[1])) for each in (mask, more_mask)]
    return torch.cat(joined, -1), masks[0] | masks[1]


class MuDiTPipeline(DiffusionPipeline):
    """transformer: SD3, Flux, PixArt or DiTTransformer2DModel.

    vae: None for a model of pixels. text_encoder, tokenizer: None for a model of classes; text_encoder_2 ...: of a
    model that has several.
    latent_size: rows of a latent by default. pixels_per_latent: pixels per row of a latent, for size conditions.
    steps, guidance: as the model was sampled in training. guidance_channels: how many channels are guided, None for
    all. text_forms: the fields of a TextForm for each text encoder; of a single one, of which the last states are
    taken, max_length, the most tokens per caption, and text_encoder_source (TextForm.source, a list) will do.
    vae_source: [path or id, subfolder, class of diffusers] of one that lies elsewhere.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->text_encoder_4->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own form)
    _optional_components = ["vae", *TEXT_ENCODERS, *TOKENIZERS]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        text_encoder_4: Any = None,
        tokenizer_4: Any = None,
        latent_size: int = 32,
        pixels_per_latent: int = 8,
        max_length: int = 256,
        steps: int = 50,
        guidance: float = 4.0,
        guidance_channels: Any = None,  # Any, because diffusers 0.35 knows no `int | None`
        vae_source: Any = None,
        text_encoder_source: Any = None,
        text_forms: Any = None,
    ) -> None:
        super().__init__()
        if vae is None and vae_source is not None:
            path, subfolder, *class_names = vae_source  # which older folders do not name
            autoencoder_class = getattr(diffusers, str((class_names or ["AutoencoderKL"])[0]))
            vae = autoencoder_class.from_pretrained(path, subfolder=subfolder)
        texts = [
            (text_encoder, tokenizer),
            (text_encoder_2, tokenizer_2),
            (text_encoder_3, tokenizer_3),
            (text_encoder_4, tokenizer_4),
        ]
        plain = {"max_length": max_length, "source": text_encoder_source}
        self._forms = [TextForm(**form) for form in text_forms or (plain,)]
        for number, form in enumerate(self._forms):
            if texts[number][0] is None and form.source is not None:
                texts[number] = form.load()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            **dict(zip(TEXT_ENCODERS, (model for model, _ in texts), strict=True)),
            **dict(zip(TOKENIZERS, (each for _, each in texts), strict=True)),
        )
        self.register_to_config(
            latent_size=latent_size,
            pixels_per_latent=pixels_per_latent,
            max_length=max_length,
            steps=steps,
            guidance=guidance,
            guidance_channels=guidance_channels,
            vae_source=vae_source,
            text_encoder_source=text_encoder_source,
            text_forms=text_forms,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | list[str] | list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """prompt: captions, or numbers of classes. height, width: in pixels, of a size that the model knows.

        latents: the noise to start from [B, C, h, w], else from `generator`. output_type: "pil", "np" or "pt" (in
        [0, 1]), or "latent". guidance_scale 1 is no guidance. negative_prompt: captions in place of the empty one.
        num_images_per_prompt: those of a prompt follow each other. callback_on_step_end: as in diffusers: it may
        return other latents, and end the steps by pipeline._interrupt = True.
        """
        if {*callback_on_step_end_tensor_inputs} - {*self._callback_tensor_inputs}:
            raise ValueError(f"a callback of this pipeline is given {self._callback_tensor_inputs} alone")
        prompts, negatives = self._repeated(prompt, negative_prompt, num_images_per_prompt)
        config, self._interrupt = self._settings, False
        guidance = config.guidance if guidance_scale is None else guidance_scale
        x = self._first_latents(len(prompts), height, width, generator, latents)
        conditional = self._predictor(prompts)
        unconditional = self._predictor(negatives) if guidance != 1 else None
        channels = self._channels()
        count = config.guidance_channels or channels
        learned = getattr(self.scheduler.config, "variance_type", None) == "learned_range"
        step_arguments = {"generator": generator} if hasattr(self.scheduler.config, "variance_type") else {}
        self._set_timesteps(num_inference_steps or config.steps, self._execution_device)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # pyright: ignore (untyped there)
            if self._interrupt:
                break
            output = conditional(x, t)
            if unconditional is not None:
                without = unconditional(x, t)[:, :count]
                output[:, :count] = without + guidance * (output[:, :count] - without)
            output = output if learned else output[:, :channels]
            x = self.scheduler.step(output, t, x, return_dict=False, **step_arguments)[0]
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {"latents": x}).pop("latents", x)
        images: Any = x if output_type == "latent" else self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the steps, by _interrupt."""
        return self._interrupt

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write model_index.json, with this file beside it: save_pretrained ends with it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inspect.getfile(type(self)), Path(save_directory) / "pipeline.py")
        super().save_config(save_directory, push_to_hub, **options)

    def to_json_string(self) -> str:
        """The text of model_index.json, by which diffusers finds the class in pipeline.py."""
        index = {**json.loads(super().to_json_string()), "_class_name": ["pipeline", MuDiTPipeline.__name__]}
        return json.dumps(index, indent=2) + "\n"

    def _repeated(self, prompt: Any, negative_prompt: Any, times: int) -> tuple[list[Any], list[Any]]:
        """Prompts, and what is guided away from, `times` in a row each."""
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        if negative_prompt is not None and self.text_encoder is None:
            raise ValueError("negative_prompt: this model has classes, and no captions")
        each = negative_prompt
        negatives = [each] * len(prompts) if each is None or isinstance(each, str) else list(each)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        return [each for each in prompts for _ in range(times)], [each for each in negatives for _ in range(times)]

    def _first_latents(
        self, count: int, height: int | None, width: int | None, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """The noise [count, C, h, w] in float32 of images of a size that the model knows."""
        config = self.transformer.config
        downsample = 1 if self.vae is None else latent_form(self.vae).downsample
        sides = [side or self._settings.latent_size * downsample for side in (height, width)]
        if latents is not None and height is None and width is None:
            sides = [side * downsample for side in latents.shape[-2:]]
        known = self._settings.latent_size * downsample
        if self._class() == "DiTTransformer2DModel" and sides != [known] * 2:
            raise ValueError(f"this model knows one size: {known} pixels per side, got {sides[0]} x {sides[1]}")
        unit = downsample * config.patch_size
        most = (getattr(config, "pos_embed_max_size", None) or max(sides)) * unit
        if any(side % unit or not 0 < side <= most for side in sides):
            limit = f" of at most {most}" if most < max(sides) else ""
            raise ValueError(f"height and width must be multiples of {unit}{limit}, got {sides[0]} x {sides[1]}")
        shape = (count, self._channels(), sides[0] // downsample, sides[1] // downsample)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must be of shape {[*shape]}, got {[*latents.shape]}")
        return latents.to(self._execution_device, torch.float32)  # the schedulers of these models begin at variance 1

    @property
    def _settings(self) -> Any:
        return self.config

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        if hasattr(self.scheduler.config, "shift"):
            # A flow's own default shifts its last time twice; these are shifted once, and end at 0.
            self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            form = latent_form(self.vae)
            scale, shift = (each.to(latents) if isinstance(each, Tensor) else each for each in (form.scale, form.shift))
            latents = F.pixel_shuffle(latents / scale + shift, form.patch).to(self.vae.dtype)
            latents = self.vae.decode(latents[:, :, None] if form.video else latents).sample.float()
            latents = latents[:, :, 0] if form.video else latents
        images = (latents.clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    # ------------------------------------------------------------------------------------------- what is conditioned on

    def _class(self) -> str:
        return type(self.transformer).__name__

    def _channels(self) -> int:
        """Of a latent."""
        config = self.transformer.config
        return config.out_channels if self._class() == "FluxTransformer2DModel" else config.in_channels

    def _predictor(self, prompts: list[Any]) -> Predict:
        """The transformer conditioned on these prompts; None is the absent condition."""
        kind = self._class()
        if kind == "DiTTransformer2DModel":
            return self._of_classes(prompts)
        states, mask, pooled = self._encode(["" if prompt is None else str(prompt) for prompt in prompts])
        return self._of_masked_text(states, mask) if kind.startswith("PixArt") else self._of_text(states, mask, pooled)

    def _of_classes(self, prompts: list[Any]) -> Predict:
        null = self.transformer.config.num_embeds_ada_norm
        numbers = [null if prompt is None else int(prompt) for prompt in prompts]
        labels = torch.tensor(numbers, device=self._execution_device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            timestep = t.to(x.device).expand(len(x))
            x = x.to(self.transformer.dtype)
            return self.transformer(x, timestep=timestep, class_labels=labels, return_dict=False)[0].float()

        return predict

    def _of_masked_text(self, states: Tensor, mask: Tensor) -> Predict:
        sized = self.transformer.config.use_additional_conditions

        def predict(x: Tensor, t: Tensor) -> Tensor:
            size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
            if sized:
                sides = torch.tensor(x.shape[-2:], device=x.device, dtype=torch.float32)
                size["resolution"] = (sides * self._settings.pixels_per_latent).expand(len(x), 2)
                size["aspect_ratio"] = (sides[0] / sides[1]).expand(len(x), 1)
            return self.transformer(
                x.to(self.transformer.dtype),
                encoder_hidden_states=states,
                encoder_attention_mask=mask.to(states.dtype),
                timestep=t.to(x.device).expand(len(x)),
                added_cond_kwargs=size,
                return_dict=False,
            )[0].float()

        return predict

    def _of_text(self, states: Tensor, mask: Tensor, pooled: Tensor) -> Predict:
        """This transformer takes no mask: captions of one length go together, without padding. Without pooled vectors
        (P is 0) it takes the mean of the states."""
        lengths = mask.sum(1).tolist()
        groups = {length: [i for i, own in enumerate(lengths) if own == length] for length in lengths}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            output = torch.empty_like(x)
            for length, rows in groups.items():
                text = states[rows, :length]
                vector = pooled[rows] if pooled.shape[1] else text.mean(1)
                call = self._flux if self._class() == "FluxTransformer2DModel" else self._sd3
                x_in, times = x[rows].to(self.transformer.dtype), t.to(x.device).expand(len(rows))
                output[rows] = call(x_in, text, vector, times).float()
            return output

        return predict

    def _sd3(self, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        return self.transformer(
            x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False
        )[0]

    def _flux(self, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        """This transformer takes patches, their places (frame, row, column), and times from 0 to 1."""
        patch = self.transformer.config.patch_size
        patches = F.pixel_unshuffle(x, patch)  # [B, C P P, h, w]
        sides = [torch.arange(side, device=x.device) for side in (1, *patches.shape[-2:])]
        output = self.transformer(
            patches.flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t / 1000,
            img_ids=torch.cartesian_prod(*sides),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.int64, device=x.device),
            return_dict=False,
        )[0]  # [B, h w, C P P]
        return F.pixel_shuffle(output.mT.unflatten(2, patches.shape[-2:]), patch)

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, L, E], zero past a caption's end, their mask bool [B, L], and pooled vectors [B, P], of all text
        encoders."""
        blocks: list[tuple[Tensor, Tensor]] = []
        vectors: list[Tensor] = []
        for form, name, tokenizer in zip(self._forms, TEXT_ENCODERS, TOKENIZERS, strict=False):
            model = getattr(self, name)
            found = form.encode(model, getattr(self, tokenizer), captions, self._execution_device)
            states, mask, vector = found[0].to(self.transformer.dtype), found[1], found[2].to(self.transformer.dtype)
            if form.join == "features":
                blocks[-1] = _along_features(*blocks[-1], states, mask)
            elif form.join == "tokens":
                blocks.append((states, mask))
            vectors.append(vector)
        return *_joined(blocks), torch.cat(vectors, -1)
