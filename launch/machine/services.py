"""What is had from elsewhere: encoders, the Hugging Face hub, Slurm."""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from data.config import NONE
from data.encoders.fetch import fetch
from data.errors import DataError
from launch.machine.finding import Finding, answer, listed

_ANSWER_S = 5.0


def encoders(named: Mapping[str, tuple[str, str | None]] | None) -> Finding:
    """named: {key: (path, subfolder)} of a config's encoders, which must be here; None: what the cache holds."""
    if named is None:
        cache = _cache()
        models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
        if not models:
            return Finding("note", "encoders", f"none in {cache}", "mudit fetch --config NAME")
        return Finding("fine", "encoders", f"{listed(models)} in {cache} (--config NAME looks for those of a config)")
    missing = []
    for key, (path, subfolder) in named.items():
        try:
            if path != NONE and not Path(path).is_dir():
                fetch(key, path, subfolder, None, download=False)
        except DataError:
            missing.append(f"{key} {path}")
    if missing:
        return Finding("short", "encoders", f"not here: {listed(missing)}", "mudit fetch --config NAME")
    there = [path for path, _ in named.values() if path != NONE]
    return Finding("fine", "encoders", listed(there) or "the config names none")


def hub() -> Finding:
    """Whether encoders can be fetched from here."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("note", "hub", "HF_HUB_OFFLINE is set", "unset it for mudit fetch; jobs run well with it")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = bool(os.environ.get("HF_TOKEN")) or (_home() / "token").is_file()
    found = f"with {'a' if token else 'no'} token (licences that must be accepted need HF_TOKEN)"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError):
        return Finding("note", "hub", "does not answer", "mudit fetch on a node with a network, then HF_HUB_OFFLINE=1")
    return Finding("fine", "hub", f"answers, {found}")


def slurm() -> Finding:
    """Whether jobs can be submitted, and where."""
    if shutil.which("sbatch") is None:
        return Finding("note", "Slurm", "no sbatch", "mudit train on this machine; torchrun on each of several nodes")
    if (partitions := answer("sinfo", "--noheader", "--format=%P: %D x %G", timeout_s=10)) is None:
        return Finding("note", "Slurm", "sinfo does not answer", "ask your cluster's administrators")
    job = f"; this is job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return Finding("fine", "Slurm", f"{listed(partitions.splitlines())}{job}")


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def _cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub")
