"""Encoders brought from the Hugging Face hub."""

from pathlib import Path

from transformers.utils.hub import snapshot_download

from ..errors import DataError

_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # what training reads


def fetch(key: str, path: str, subfolder: str | None, to: Path | None, download: bool = True) -> Path:
    """Folder that holds the files which `path` has on the hub; DataError where they cannot be had. download: else they
    must be in the cache already."""
    # A diffusers pipeline keeps the tokenizer of text_encoder_3 in tokenizer_3.
    folders = (
        [""]
        if subfolder is None
        else [f"{part}/" for part in (subfolder, subfolder.replace("text_encoder", "tokenizer"))]
    )
    try:
        folder = Path(
            snapshot_download(
                path,
                local_dir=None if to is None else to / path,
                allow_patterns=[folder + pattern for folder in folders for pattern in _READ],
                ignore_patterns=["*.fp16*"],  # a second copy
                local_files_only=not download,
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{key}: {path!r} is no local folder and cannot be had from the hub ({reason}); check the name, the "
            "network, HF_HUB_OFFLINE, and HF_TOKEN for a licence that must be accepted"
        ) from None
    if not any((folder / folders[0]).glob("*.safetensors")):
        raise DataError(
            f"{key}: {path!r} has no *.safetensors{f' in {subfolder}' if subfolder else ''}, and other weights are not "
            "read; of T5-v1.1-XXL stabilityai/stable-diffusion-3-medium-diffusers (subfolder text_encoder_3) and "
            "PixArt-alpha/PixArt-XL-2-512x512 (subfolder text_encoder) have them"
        )
    return folder
