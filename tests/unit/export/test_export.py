"""launch/export.py: what it refuses, published names, numbered files, damaged input, memory."""

import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from data.debug import ensure_debug_assets
from export.diffusers_folder import against_stock, position_table
from export.forms import export_note, refusals
from export.names import LAYOUTS, fold, layout
from tests.distributed.runs import weights
from tests.helpers.exports import FOLDED, config_of, load_exactly, random_checkpoint, run_export, unigram_t5
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError, ConfigError

FLUX = ("model.positions=rope", "model.single_depth=1")
SLACK = 16 * 2**20  # bytes: what an allocator keeps, and code that is first used here (most in torch's CUDA build)
VAE = ("autoencoder.path=vae", "autoencoder.channels=4", "autoencoder.downsample=8", "data.resolution=256")


@pytest.fixture(scope="module", autouse=True)
def _encoders_of_the_debug_configs() -> None:
    ensure_debug_assets(ROOT / ".cache" / "debug")


def exported(folder: Path, patch: pytest.MonkeyPatch, config: TrainConfig, *arguments: str) -> dict[str, Tensor]:
    """Our parameters; the export lies in folder / "to"."""
    _, tensors = random_checkpoint(folder / "from", config)
    run_export(patch, "--checkpoint", folder / "from", "--output", folder / "to", "--weights", "live", *arguments)
    return tensors


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides", "form", "message"),
    [
        ("uvit", (), "diffusers", r"diffusers has no model like model\.kind uvit"),
        ("dit", ("model.time_freq_shift=0",), "diffusers", r"i / \(128 - 1\).*--format official"),
        ("dit", (), "official", r"frequencies i / 128.*model\.time_freq_shift 1"),
        ("mmdit", ("model.time_freq_shift=1",), "diffusers", r"i / \(128 - 0\)"),
        ("pixart", ("model.time_freq_shift=1",), "diffusers", r"i / \(128 - 0\)"),
        ("mmdit", ("objective.predict=x",), "diffusers", r"output for the velocity, this model's is x"),
        ("mmdit", ("model.mlp_ratio=3",), "diffusers", r"MLPs of 4 times the width.*model\.mlp_ratio 3"),
        ("mmdit", ("model.mlp=swiglu",), "diffusers", r"SD3Transf.* MLPs with GELU, this model model\.mlp swiglu"),
        ("mmdit", ("model.positions=rope",), "diffusers", r"SD3Transf.* adds a table .* model\.positions rope"),
        ("mmdit", ("model.single_depth=1",), "diffusers", r"two streams in every block, .* model\.single_depth 1"),
        ("mmdit", (*FLUX, "model.mlp=swiglu"), "diffusers", r"FluxTransf.* MLPs with GELU, .* model\.mlp swiglu"),
        ("mmdit", (*FLUX, "model.qk_norm=false"), "diffusers", r"FluxTransf.* this model has model\.qk_norm false"),
        ("mmdit", ("text_encoder.more=[" + 4 * "{path: t5, width: 64, max_length: 8}, " + "]",), "diffusers",
         r"have 4 text encoders at most, this model has 5 \(text_encoder\.more\)"),
        ("mmdit", (), "official", r"model\.kind mmdit goes to diffusers"),
        ("pixart", (), "official", r"model\.kind pixart goes to diffusers"),
    ],
)  # fmt: skip
def test_what_the_other_code_cannot_express(
    kind: str, overrides: tuple[str, ...], form: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(tmp_path, monkeypatch, config_of(kind, *overrides), "--format", form)
    assert [p.name for p in tmp_path.iterdir()] == ["from"]


def test_a_model_of_synthetic_data_needs_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        "mmdit", "data.shards=synthetic", "text_encoder.path=none", *VAE[1:], "model.pos_embed_max_size=8"
    )
    with pytest.raises(ConfigError, match=r"(?s)text_encoder\.path is none: add.*autoencoder\.path is none.*add"):
        exported(tmp_path, monkeypatch, config)


@pytest.mark.slow
def test_other_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("dit")
    exported(tmp_path, monkeypatch, config)
    arguments = ("--checkpoint", tmp_path / "from", "--output", tmp_path / "other")
    with pytest.raises(ConfigError, match="exists already"):
        run_export(monkeypatch, "--checkpoint", tmp_path / "from", "--output", tmp_path / "to")
    with pytest.raises(CheckpointError, match=r"has no ema weights.*--weights"):
        run_export(monkeypatch, *arguments, "ema.decays=[0.5]")
    with pytest.raises(CheckpointError, match="of another model"):
        run_export(monkeypatch, *arguments, "model.width=32")
    (data,) = (tmp_path / "from").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        run_export(monkeypatch, *arguments)
    assert not (tmp_path / "other").exists()


STOCK = {
    "dit": ("model.num_classes=1000", *VAE),
    "pixart": ("text_encoder.max_length=120", *VAE),
}


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("dit", ("model.num_classes=10",), "takes label 1000 for no class, this model 10"),
        ("dit", ("sample.guidance_channels=3",), "guides all channels, not the first 3"),
        ("dit", ("sample.sampler=ancestral",), "drops the learned variance"),
        ("dit", (*("autoencoder.path=none", "autoencoder.channels=3", "autoencoder.downsample=1"),), "model of pixels"),
        ("pixart", ("text_encoder.max_length=48",), "cuts captions at 120 tokens, not at 48"),
        ("pixart", ("text_encoder.layers=[-2]",), "takes the last states of one text encoder"),
        ("pixart", ("data.resolution=128",), "knows latents of 32, 64, 128 rows"),
        ("pixart", ("model.micro_conditions=true", "model.pixels_per_latent=8", "model.width=48", "mup.base_width=48"),
         "knows latents of 128 rows"),
        ("pixart", ("model.learn_sigma=false", "objective.kind=rectified_flow"), "does not shift the times"),
        ("mmdit", (), "two CLIP encoders"),
        ("mmdit", ("text_encoder.pad=true",), "StableDiffusion3Pipeline shifts the last time twice"),
    ],
)  # fmt: skip
def test_when_the_stock_pipeline_would_sample_wrongly(kind: str, overrides: tuple[str, ...], message: str) -> None:
    if kind in STOCK:
        assert list(against_stock(config_of(kind, *STOCK[kind]), None)) == []
    assert any(message in reason for reason in against_stock(config_of(kind, *STOCK.get(kind, ()), *overrides), None))


def test_every_backbone_has_its_forms() -> None:
    for kind in ("mmdit", "pixart", "dit", "uvit"):
        open_forms = [form for form in ("diffusers", "official") if not list(refusals(config_of(kind), form))]
        assert open_forms == (["official"] if kind == "uvit" else ["diffusers"])
        assert all((kind, form) in LAYOUTS for form in open_forms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form", "overrides"),
    [
        ("mmdit", "diffusers", ()),
        ("pixart", "diffusers", ()),
        ("dit", "diffusers", ()),
        ("dit", "official", ("model.time_freq_shift=0",)),
    ],
)
def test_the_projector_stays_behind(
    kind: str, form: Any, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what a model without REPA gives: no name more or less, and the same numbers."""
    repa = ("objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_hidden=8")
    plain = config_of(kind, *FOLDED, *overrides)
    ours = exported(tmp_path, monkeypatch, config_of(kind, *FOLDED, *overrides, *repa), "--format", form)
    assert "projector.fc1.weight" in ours
    folder = tmp_path / "to" if form == "official" else tmp_path / "to" / "transformer"
    [file] = folder.glob("*.safetensors")
    written = load_file(file)
    expected = published(plain, form, {name: t for name, t in ours.items() if not name.startswith("projector.")})
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------ the other way, by any names
def published(config: TrainConfig, form: Any, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters as another code base stores them, in memory."""
    table = build_mup_table(config)
    tokens = config.latent_size // config.model.patch_size
    shapes = {name: row.shape for name, row in table.rows.items()}
    to = layout(config.model, config.autoencoder.channels, shapes, form, tokens)
    theirs = {name: torch.zeros(shape).reshape(-1) for name, shape in to.shapes.items()}
    for piece in to.slices:
        values = ours[piece.ours].reshape(-1) * fold(table, piece.ours)
        theirs[piece.theirs][piece.at :][: piece.size] = values[piece.ours_at :][: piece.size]
    for name in to.tables:
        theirs[name] = position_table(config)
    return {name: values.reshape(to.shapes[name]) for name, values in theirs.items()}


@pytest.mark.slow
def test_sd3s_own_names_are_those_that_diffusers_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("mmdit", *FOLDED)
    ours = exported(tmp_path, monkeypatch, config)
    theirs = {f"model.diffusion_model.{name}": t for name, t in published(config, "official", ours).items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(theirs))
    twin = load_exactly(SD3Transformer2DModel, tmp_path / "to" / "transformer", torch.float32).state_dict()
    dead = {
        f"transformer_blocks.2.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }
    assert converted.keys() - dead == twin.keys() - dead
    for name in twin.keys() - dead:
        assert torch.equal(converted[name], twin[name]), name
    save_file(theirs, tmp_path / "sd3.safetensors")
    back = imported(tmp_path, monkeypatch, "mmdit", tmp_path / "sd3.safetensors", *FOLDED)
    assert all(torch.allclose(back[name], ours[name], rtol=3e-7, atol=0) for name in ours)


def imported(folder: Path, patch: pytest.MonkeyPatch, kind: str, source: Path, *overrides: str) -> dict[str, Tensor]:
    own = ("--config", f"{kind}_debug_mup.yaml", "--output", folder / "back")
    run_export(patch, "--import", source, *own, *overrides)
    return weights(folder / "back")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixart", "dit", "uvit"])
def test_official_files_of_torch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training checkpoints with more around the weights; at m = 2 nothing is rounded."""
    config = config_of(kind, *(["model.time_freq_shift=0"] if kind == "dit" else []))
    _, ours = random_checkpoint(tmp_path / "from", config)
    theirs = published(config, "official", ours)
    theirs |= {"y_embedder.y_embedding": torch.ones(4, 64)} if kind == "pixart" else {}
    whole = {"model": {}, "ema": theirs, "args": Namespace(lr=1e-4)}  # as DiT's training writes it
    old = {"_use_new_zipfile_serialization": kind != "uvit"}  # torch's files before 1.6
    torch.save(whole if kind == "dit" else theirs, tmp_path / "weights.pth", **old)
    back = imported(tmp_path, monkeypatch, kind, tmp_path / "weights.pth")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_weights_of_other_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions have no weights: what they were is known by the class, and by the axes of its config.json."""

    def refused(made: tuple[str, ...], wanted: tuple[str, ...], axes: list[int], message: str) -> None:
        config = config_of("mmdit", *made)
        _, ours = random_checkpoint(tmp_path / f"from{len(made)}{len(wanted)}", config)
        save_file(published(config, "diffusers", ours), tmp_path / "w.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": axes}))
        with pytest.raises(ConfigError, match=message):
            imported(tmp_path, monkeypatch, "mmdit", tmp_path / "w.safetensors", *wanted)
        assert not (tmp_path / "back").exists()

    refused(FLUX, FLUX, [4, 6, 6], r"axes_dims_rope is \[4, 6, 6\] in its config\.json, and \[0, 8, 8\] by this config")
    refused((), FLUX[:1], [], r"SD3Transformer2DModel adds a table of positions, this model has model\.positions rope")


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.slow
def test_bad_published_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("pixart")
    _, ours = random_checkpoint(tmp_path / "from", config)
    good, file = published(config, "diffusers", ours), tmp_path / "w.safetensors"

    def refused(tensors: dict[str, Tensor], message: str, *overrides: str) -> None:
        save_file(tensors, file)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            imported(tmp_path, monkeypatch, "pixart", file, *overrides)
        assert not (tmp_path / "back").exists()

    short = {name: t for name, t in good.items() if name != "proj_out.bias"}
    wrong = short | {"surplus": torch.ones(2), "proj_out.weight": torch.ones(3, 64)}
    refused(wrong, r"(?s)missing: proj_out\.bias.*shape: proj_out\.weight is \[3, 64\], by the.*unknown: surplus \[2\]")
    refused(good, r"(?s)shape: .*and \d+ more", "model.width=32")
    refused(good, "model.time_freq_shift is 1: these weights go with 0", "model.time_freq_shift=1")
    route = [f"model.route.{each}" for each in ("share=0.5", "start=0", "end=1", "fuse=sprint")]
    refused(good, "model.route.fuse is sprint: no published weights have its layer", *route)
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 8, "sample_size": 64}))
    refused(good, r"(?s)attention_head_dim is 8 .* 16 .*model\.head_dim.*sample_size is 64 .* 32 .*pos_embed_base_size")
    (tmp_path / "config.json").unlink()
    official = published(config, "official", ours)
    refused(
        official | {"pos_embed": official["pos_embed"].flip(1)}, "the positions pos_embed are not those of the config"
    )
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        imported(tmp_path, monkeypatch, "pixart", file)
    torch.save({"weights": Harmful()}, tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes(b"\x80\x02}q\x00(nonsense")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    for bad, message in (
        ("bad.pt", r"bad\.pt cannot be read: it holds objects \(print\) beside the weights, and making them"),
        ("cut.pt", r"cut\.pt cannot be read: it is damaged, or no file of torch\.save"),
        ("lfs.safetensors", "is a pointer of git-lfs, not the file: run git lfs pull"),
    ):
        with pytest.raises(CheckpointError, match=message):
            imported(tmp_path, monkeypatch, "pixart", tmp_path / bad)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no weights in"):
        imported(tmp_path, monkeypatch, "pixart", tmp_path / "from")


@pytest.mark.slow
def test_which_files_of_a_folder_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index says which, full precision comes before a variant of it, and what is left aside is told."""
    config = config_of("pixart")
    _, ours = random_checkpoint(tmp_path / "from", config)
    good = published(config, "diffusers", ours)
    folder, stem = tmp_path / "pipeline" / "transformer", "diffusion_pytorch_model"
    folder.mkdir(parents=True)

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({f"module.{key}": tensor.clone() for key, tensor in tensors.items()}, folder / name)

    def back() -> dict[str, Tensor]:
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        return imported(tmp_path, monkeypatch, "pixart", folder.parent)

    half = {name: tensor.half() + 1 for name, tensor in good.items()}  # other numbers, to be told apart
    save(f"{stem}.fp16.safetensors", half)
    assert not torch.equal(back()["final.bias"], ours["final.bias"]), "the variant alone is read"
    names = sorted(good)
    save(f"{stem}-00001-of-00002.safetensors", {name: good[name] for name in names[:9]})
    with pytest.raises(CheckpointError, match="has 1 of the 2 files of diffusion_pytorch_model"):
        back()
    save(f"{stem}-00002-of-00002.safetensors", {name: good[name] for name in names[9:]})
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back().items())
    told = f"read: {stem}-00001-of-00002.safetensors, {stem}-00002-of-00002.safetensors (left aside: {stem}.fp16."
    assert told in capsys.readouterr().out
    save(f"{stem}.safetensors", half)  # of another version
    parts = {f"module.{name}": f"{stem}-0000{1 + (name in names[9:])}-of-00002.safetensors" for name in names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back().items())
    (folder / f"{stem}-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing, which .*index\.json names"):
        back()
    save("another.safetensors", half)
    with pytest.raises(CheckpointError, match=r"index\.json names|holds several models"):
        back()


def test_embedders_that_differ_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("dit")
    _, ours = random_checkpoint(tmp_path / "from", config)
    theirs = published(config, "diffusers", ours)
    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(theirs, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="differs between blocks"):
        imported(tmp_path, monkeypatch, "dit", tmp_path / "w.safetensors")


# ------------------------------------------------------------------------------------------------ files and memory
@pytest.mark.slow
def test_numbered_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("mmdit", *FOLDED)
    exported(tmp_path, monkeypatch, config)
    arguments = ("--weights", "live", "--max-shard-gib", "0.001")
    run_export(monkeypatch, "--checkpoint", tmp_path / "from", "--output", tmp_path / "many", *arguments)
    one, folder = tmp_path / "to" / "transformer", tmp_path / "many" / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        with safe_open(file, "pt") as handle:
            assert file.stat().st_size <= 2**20 + 10_000 or len(list(handle.keys())) == 1
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole = load_file(one / "diffusion_pytorch_model.safetensors")
    parts = load_exactly(SD3Transformer2DModel, folder, torch.float32).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


MEASURE = """
import sys
from argparse import Namespace
from pathlib import Path
from export.write import layout_of, write_weights
from tests.helpers.exports import config_of
from trainer.build.engine import build_mup_table
from trainer.parallel.dcp import TensorReader

folder, way, *overrides = sys.argv[1:]
config = config_of("mmdit", *overrides)
table = build_mup_table(config)
source = TensorReader(Path(folder))
source.read("model/final.bias")  # a first read imports

def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = most()
if way == "hold":
    held = {f"model/{name}": source.read(f"model/{name}") for name in table.rows}
    source.read = held.get
write_weights(source, "model", table, config, layout_of(config, table, "diffusers"), Path(folder) / way, "w", 2**30)
print(most() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    """Three times the largest tensor, whatever the size of the model; were it all held, the measure would tell."""
    overrides = ("model.width=256", "model.depth=5")
    config = config_of("mmdit", *overrides)
    random_checkpoint(tmp_path / "from", config)
    sizes = [4 * math.prod(row.shape) for row in build_mup_table(config).rows.values()]
    peaks = {}
    for way in ("stream", "hold"):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "from"), way, *overrides]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks[way] = int(done.stdout.split()[-1])
    limit = 3 * max(sizes) + SLACK
    assert peaks["stream"] <= limit < sum(sizes) <= peaks["hold"], (peaks, max(sizes), sum(sizes))
    streamed, held = (load_file(tmp_path / "from" / way / "w.safetensors") for way in peaks)
    assert all(torch.equal(streamed[name], held[name]) for name in held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "width", "name"),
    [
        ("", 64, "T5TokenizerFast"),
        (".cache/debug/t5", 64, "ByT5Tokenizer"),
        (".cache/minilm", 384, "BertTokenizerFast"),
    ],
)
def test_tokenizers_are_written_for_transformers_4_as_well(
    path: str, width: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks.older_libraries loads such folders there."""
    ensure_debug_assets()
    encoder = (f"text_encoder.path={path or unigram_t5(tmp_path / 't5')}", f"text_encoder.width={width}")
    random_checkpoint(tmp_path / "run", config_of("mmdit", *encoder))
    run_export(monkeypatch, "--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["tokenizer"] == ["transformers", name]
    settings = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text())
    assert not isinstance(settings.get("extra_special_tokens"), list)
    before, after = (
        AutoTokenizer.from_pretrained(folder) for folder in (path or tmp_path / "t5", tmp_path / "out" / "tokenizer")
    )
    text = "a Green cross <extra_id_3> \u732b"
    assert before(text)["input_ids"] == after(text)["input_ids"]


def test_a_model_that_diffusers_cannot_take_is_told_before_training() -> None:
    assert export_note(config_of("mmdit")) is None
    note = export_note(load_config("dit_debug_mup.yaml"))
    assert note is not None
    assert "under official names alone: DiTTransformer2DModel computes time" in note
    assert "nowhere" in str(export_note(config_of("uvit", "model.time_freq_shift=1")))
