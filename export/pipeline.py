"""Images from a model that muDiT has trained; an exported folder carries this file as pipeline.py.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("a red apple").images[0].save("apple.png")

It samples as muDiT itself does: captions at their true length, the conditional and the unconditional prediction apart,
the schedule of training, and pixels where the model has no autoencoder. It imports diffusers, transformers and torch.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t, the scheduler's own timestep) -> the model's output [B, C or 2 C, h, w] in float32."""


class MuDiTPipeline(DiffusionPipeline):
    """transformer: SD3Transformer2DModel, PixArtTransformer2DModel or DiTTransformer2DModel.

    vae: None for a model of pixels. text_encoder, tokenizer: None for a model of classes.
    latent_size: rows of a latent by default. pixels_per_latent: pixels per row of a latent, for size conditions.
    max_length: the most tokens per caption. steps, guidance: as the model was sampled in training. guidance_channels:
    how many channels are guided, None for all. vae_source: [path or id, subfolder] and text_encoder_source: [class of
    transformers, path or id, subfolder, the tokenizer's subfolder] name parts that lie elsewhere.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
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
            path, subfolder = vae_source
            vae = AutoencoderKL.from_pretrained(path, subfolder=subfolder)
        if text_encoder is None and text_encoder_source is not None:
            class_name, path, subfolder, tokenizer_subfolder = text_encoder_source
            text_encoder = getattr(transformers, str(class_name)).from_pretrained(
                path, subfolder=subfolder or "", trust_remote_code=False
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
    ) -> ImagePipelineOutput | tuple[Any]:
        """prompt: captions, or numbers of classes. height, width: in pixels, of a size that the model knows.

        latents: the noise to start from [B, C, h, w], else from `generator`. output_type: "pil", "np" or "pt" (in
        [0, 1]), or "latent". guidance_scale 1 is no guidance.
        """
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        config, channels = self._settings, self.transformer.config.in_channels
        guidance = config.guidance if guidance_scale is None else guidance_scale
        device = self._execution_device
        downsample = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        rows, columns = ((side // downsample if side else config.latent_size) for side in (height, width))
        if self._class() == "DiTTransformer2DModel" and (rows, columns) != (config.latent_size,) * 2:
            raise ValueError(f"this model knows one size: {config.latent_size * downsample} pixels per side")
        if latents is None:
            shape = (len(prompts), channels, rows, columns)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)  # the schedulers of these models begin with a variance of 1

        conditional = self._predictor(prompts)
        unconditional = self._predictor([None] * len(prompts)) if guidance != 1 else None
        count = config.guidance_channels or channels
        learned = getattr(self.scheduler.config, "variance_type", None) == "learned_range"
        step_arguments = {"generator": generator} if hasattr(self.scheduler.config, "variance_type") else {}
        self._set_timesteps(num_inference_steps or config.steps, device)
        for t in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore (untyped there)
            output = conditional(x, t)
            if unconditional is not None:
                without = unconditional(x, t)[:, :count]
                output[:, :count] = without + guidance * (output[:, :count] - without)
            output = output if learned else output[:, :channels]
            x = self.scheduler.step(output, t, x, return_dict=False, **step_arguments)[0]
        images: Any = x if output_type == "latent" else self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
            scale, shift = self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0
            latents = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float()
        images = (latents.clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    # ------------------------------------------------------------------------------------------- what is conditioned on

    def _class(self) -> str:
        return type(self.transformer).__name__

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
                output[rows] = self.transformer(
                    x[rows].to(self.transformer.dtype),
                    encoder_hidden_states=text,
                    pooled_projections=text.mean(1),
                    timestep=t.to(x.device).expand(len(rows)),
                    return_dict=False,
                )[0].float()
            return output

        return predict

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
