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


class MuDiTPipeline(DiffusionPipeline):
    """transformer: SD3, Flux, PixArt or DiTTransformer2DModel.

    vae: None for a model of pixels. text_encoder, tokenizer: None for a model of classes.
    latent_size: rows of a latent by default. pixels_per_latent: pixels per row of a latent, for size conditions.
    max_length: the most tokens per caption. steps, guidance: as the model was sampled in training. guidance_channels:
    how many channels are guided, None for all. vae_source: [path or id, subfolder, class of diffusers] and
    text_encoder_source: [class of transformers, path or id, subfolder, the tokenizer's subfolder] name parts that lie
    elsewhere.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own form)
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        latent_size: int = 32,
        pixels_per_latent: int = 8,
        max_length: int = 256,
        steps: int = 50,
        guidance: float = 4.0,
        guidance_channels: int | None = None,
        vae_source: list[str | None] | None = None,
        text_encoder_source: list[str | None] | None = None,
    ) -> None:
        super().__init__()
        if vae is None and vae_source is not None:
            path, subfolder, *class_names = vae_source  # which older folders do not name
            autoencoder_class = getattr(diffusers, str((class_names or ["AutoencoderKL"])[0]))
            vae = autoencoder_class.from_pretrained(path, subfolder=subfolder)
        if text_encoder is None and text_encoder_source is not None:
            class_name, path, subfolder, tokenizer_subfolder = text_encoder_source
            alone = {"is_encoder_decoder": False} if class_name == "T5GemmaEncoderModel" else {}
            text_encoder = getattr(transformers, str(class_name)).from_pretrained(
                path, subfolder=subfolder or "", trust_remote_code=False, **alone
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, subfolder=tokenizer_subfolder or "", trust_remote_code=False
            )
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
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
        states, mask = self._encode(["" if prompt is None else str(prompt) for prompt in prompts])
        return self._of_masked_text(states, mask) if kind.startswith("PixArt") else self._of_text(states, mask)

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

    def _of_text(self, states: Tensor, mask: Tensor) -> Predict:
        """This transformer takes no mask: captions of one length go together, without padding."""
        lengths = mask.sum(1).tolist()
        groups = {length: [i for i, own in enumerate(lengths) if own == length] for length in lengths}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            output = torch.empty_like(x)
            for length, rows in groups.items():
                text = states[rows, :length]
                call = self._flux if self._class() == "FluxTransformer2DModel" else self._sd3
                output[rows] = call(x[rows].to(self.transformer.dtype), text, t.to(x.device).expand(len(rows))).float()
            return output

        return predict

    def _sd3(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        pooled = text.mean(1)
        return self.transformer(
            x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False
        )[0]

    def _flux(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """This transformer takes patches, their places (frame, row, column), and times from 0 to 1."""
        patch = self.transformer.config.patch_size
        patches = F.pixel_unshuffle(x, patch)  # [B, C P P, h, w]
        sides = [torch.arange(side, device=x.device) for side in (1, *patches.shape[-2:])]
        output = self.transformer(
            patches.flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=text.mean(1),
            timestep=t / 1000,
            img_ids=torch.cartesian_prod(*sides),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.int64, device=x.device),
            return_dict=False,
        )[0]  # [B, h w, C P P]
        return F.pixel_shuffle(output.mT.unflatten(2, patches.shape[-2:]), patch)

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, E], zero past a caption's end, and the mask bool [B, L]."""
        tokens = self.tokenizer(
            captions,
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self._settings.max_length,
            return_tensors="pt",
        )
        ids, mask = (tokens[key].to(self._execution_device) for key in ("input_ids", "attention_mask"))
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.masked_fill(mask[..., None] == 0, 0.0).to(self.transformer.dtype), mask.bool()
