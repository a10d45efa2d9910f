"""Exported folders sample the same images under transformers 4.57 and diffusers 0.35 as under the versions here.

    python -m benchmarks.older_libraries --output benchmarks/results/older_libraries.json

It installs the older ones, all but torch, into an environment of their own. The largest difference of a pixel in [0, 1]
is in the JSON; the command ends with 1 where a folder does not load or an image differs by more than 1e-4.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.machine import write
from data.debug import ensure_debug_assets
from tests.helpers.exports import config_of, random_checkpoint, run_export, unigram_t5
from tests.helpers.language_models import save, save_sd3, sd3_overrides

OLDER = ("transformers==4.57.*", "diffusers==0.35.*", "sentencepiece", "protobuf")
TOLERANCE = 1e-4
# In a process of each environment: folders -> FOLDER/VERSIONS.npy, the images of the same noise.
_SAMPLE = """
import sys
import numpy, torch
sys.modules["torchao"] = None  # diffusers 0.35 cannot import the one of this environment
from diffusers import DiffusionPipeline

for folder in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [3, 7] if pipeline.text_encoder is None else ["a red circle on a blue background", "a Green cross"]
    numpy.save(f"{folder}/{sys.argv[1]}.npy", pipeline(prompts, latents=noise, output_type="np").images)
"""


def environment_of(folder: Path, *packages: str) -> Path:
    """The interpreter of an environment with these packages, which is made where it is missing. What they do not bring,
    such as torch, it takes from this environment."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        [own] = folder.glob("lib/python*/site-packages")
        (own / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")  # searched after its own packages
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "ready").touch()
    return python


def export_all(folder: Path) -> list[Path]:
    """A folder of each backbone that diffusers has, of each kind of tokenizer (of bytes, WordPiece and Unigram), and of
    other text: three encoders with pooled vectors, a language model's chat, an encoder by reference."""
    ensure_debug_assets()
    t5 = f"text_encoder.path={unigram_t5(folder / 't5')}"
    minilm = ("text_encoder.path=.cache/minilm", "text_encoder.width=384")
    chat = f"path: {save('qwen3', folder / 'qwen3')}, max_length: 40, width: 64, layers: [1, 3], chat: ''"
    kinds: dict[str, tuple[str, ...]] = {
        "mmdit_bytes": (),
        "mmdit_wordpiece": minilm,
        "mmdit_reference": minilm,
        "mmdit_unigram": (t5,),
        "pixart_unigram": (t5,),
        "dit": (),
        "mmdit_sd3": tuple(sd3_overrides(save_sd3(folder / "sd3"))),
        "mmdit_chat": (f"text_encoder={{{chat}}}",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, overrides in kinds.items():
            random_checkpoint(folder / "runs" / name, config_of(name.partition("_")[0], *overrides))
            way = "reference" if name == "mmdit_reference" else "copy"
            run_export(patch, "--checkpoint", folder / "runs" / name, "--output", folder / name, "--encoders", way)
    return [folder / name for name in kinds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON of the differences")
    output = parser.parse_args().output
    report: dict[str, Any] = {
        "here": [f"{name} {version(name)}" for name in ("transformers", "diffusers")],
        "older": OLDER,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folders = export_all(Path(temporary))
        failures: dict[str, str] = {}
        for name, python in (("here", Path(sys.executable)), ("older", environment_of(Path(".cache/older"), *OLDER))):
            for folder in folders:
                done = subprocess.run([python, "-c", _SAMPLE, name, folder], capture_output=True, text=True)
                if done.returncode:
                    failures[f"{folder.name} ({name})"] = done.stderr.strip().splitlines()[-1]
        report["failures"] = failures
        report["largest_difference"] = {
            folder.name: float(np.abs(np.load(folder / "here.npy") - np.load(folder / "older.npy")).max())
            for folder in folders
            if not any(key.startswith(f"{folder.name} ") for key in failures)
        }
    write(output, report)
    return int(bool(failures) or max(report["largest_difference"].values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
