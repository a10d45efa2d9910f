"""Memory, FLOPs, traffic, time and cost of a config on a cluster, as a dictionary and as text."""

import math
from pathlib import Path
from typing import Any

from data.config import TextModelConfig
from data.errors import DataError
from data.files import parse_json

from ..build.engine import build_mup_table
from ..build.flops import image_flops
from ..config.resolve import Resolved, keeps_gathered, least_rows, micro_batch_size, resolve
from ..config.schema import TrainConfig
from ..config.stages import images_of
from ..errors import ConfigError
from ..mup.table import MuTable
from .arithmetic import products_flops
from .cluster import GIB, Cluster, usable_bytes
from .memory import Memory, equal_parts
from .muon import polar_flops, state_numbers
from .right_size import describe_size, right_size
from .simulation import Profile, profile
from .step_time import StepTime, Work, micro_batches, step_time

CARDS_GB = (80, 141)  # H100, H200
NODE = 8  # GPUs that a node of the smallest cluster has; below a node any number will do
# Parameters of T5-v1.1's encoders by width, and of Stable Diffusion's autoencoders: the files need not be here.
T5_PARAMETERS = {512: 35.3e6, 768: 109.6e6, 1024: 341.2e6, 2048: 1.22e9, 4096: 4.76e9}
_CHARACTERS = 4  # of English text in a token
AUTOENCODER_PARAMETERS = 83.7e6
# By features: S, B, L and g of DINOv2; H+ and 7B of DINOv3, whose S, B and L are as large.
DINO_PARAMETERS = {384: 22.1e6, 768: 86.6e6, 1024: 304e6, 1536: 1136e6, 1280: 841e6, 4096: 6716e6}


def encoder_bytes(config: TrainConfig) -> dict[str, int]:
    """Weights of the frozen encoders on each GPU: text and REPA's in bf16, images in fp32."""
    text, images = config.text_encoder, config.autoencoder
    found = {}
    if config.label_classes is None and text.path != "none":
        found["text_encoder"] = sum(round(2 * _text_parameters(one)) for one in text.models)
    if images.path != "none":
        found["autoencoder"] = round(4 * (_stored_parameters(images.path, images.subfolder) or AUTOENCODER_PARAMETERS))
    if config.projector is not None and config.objective.repa_encoder != "none":
        features = _stored_parameters(config.objective.repa_encoder, None)
        found["repa_encoder"] = round(2 * (features or DINO_PARAMETERS.get(config.projector.features, 86.6e6)))
    return found


def text_encoder_flops(config: TrainConfig) -> int:
    """FLOPs of the text encoder for the caption of one image, padded to its full length."""
    if "text_encoder" not in encoder_bytes(config):
        return 0
    # The text before a caption is not in max_length, and its tokens are not known without the tokenizer.
    lengths = [one.max_length + len(one.chat or one.prefix) // _CHARACTERS for one in config.text_encoder.models]
    parameters = [_text_parameters(one) for one in config.text_encoder.models]
    return round(sum(2 * number * length for number, length in zip(parameters, lengths, strict=True)))


def _text_parameters(text: TextModelConfig) -> float:
    """Parameters of a text encoder. Raises ConfigError where they are not known."""
    parameters = _stored_parameters(text.path, text.subfolder)
    if parameters is None and text.chat is None and not (text.layers or text.pooled_width):  # as a T5 is used
        parameters = T5_PARAMETERS.get(text.width)
    if parameters is None:
        raise ConfigError(
            f"text_encoder.path {text.path!r} is no local folder and text_encoder.width {text.width} is not that "
            f"of a T5-v1.1 ({', '.join(map(str, T5_PARAMETERS))}): fetch it first (launch/fetch.py)"
        )
    return parameters


def _stored_parameters(path: str, subfolder: str | None) -> int | None:
    """Numbers in the safetensors files of a local folder, from their headers; None where there are none.
    Raises DataError where one is damaged."""
    files = sorted((Path(path) / (subfolder or "")).glob("*.safetensors"))
    total = 0
    for each in files:
        try:
            with open(each, "rb") as file:
                header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), each.stat().st_size)))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{each} cannot be read ({error}): fetch it again") from None
    return total if files else None


def smallest_count(config: TrainConfig, memory: Memory, usable: int) -> tuple[int, int] | None:
    """(fewest GPUs that hold the run, samples of a micro-batch there): whole nodes above one node, the weights sharded
    over all. None where the global batch does not feed enough of them."""
    batch = config.train.global_batch_size
    for gpus in (*range(1, NODE), *range(NODE, batch + 1, NODE)):
        share = -(-batch // gpus)
        if rows := memory.fitting_rows(gpus, share, usable - (memory.copy_alone if gpus == 1 else 0)):
            return gpus, rows
    return None


def timed(config: TrainConfig, cluster: Cluster, step: StepTime) -> dict[str, Any]:
    """Time, speed and cost of a run whose steps take `step`."""
    batch = config.train.global_batch_size
    hours = step.step_s * config.train.steps / 3600
    peak = cluster.gpus * cluster.card.peak_tflops * 1e12
    return {
        "step_s": step.step_s,
        "slower_s": step.slower_s,
        "sum_s": step.sum_s,
        "arithmetic_s": step.arithmetic_s,
        "network_s": step.network.seconds,
        "parts_s": {**step.passes._asdict(), "text_encoder": step.encoding_s, "parameters": step.update_s},
        "mfu": batch * image_flops(config) / (step.step_s * peak),
        "images_per_s": batch / step.step_s,
        "days": hours / 24,
        "dollars": hours * cluster.gpus * cluster.price,
    }


def _placed(
    config: TrainConfig, memory: Memory, cluster: Cluster, resolved: Resolved, accumulates: bool
) -> dict[str, Any]:
    """GiB of each GPU by part at the peak, and what would fit: micro-batches there, and fewest GPUs of each card."""
    parts = memory.parts(resolved.shard, resolved.micro_batch_rows, accumulates)
    total = sum(parts.values())
    fewest = {f"{gb}_gb": smallest_count(config, memory, usable_bytes(gb)) for gb in CARDS_GB}
    return {
        **{part: size / GIB for part, size in parts.items()},
        "total": total / GIB,
        "usable": cluster.usable / GIB,
        "fits": total <= cluster.usable,
        "largest_micro_batch": memory.largest_rows(resolved.shard, cluster.usable, False),
        "smallest_gpus": {
            card: None if found is None else {"gpus": found[0], "micro_batch": found[1]}
            for card, found in fewest.items()
        },
    }


def _checkpoint_gib(config: TrainConfig, table: MuTable, parameters: int) -> dict[str, float]:
    """On the disk: weights, what the optimizers keep, and the averages in fp32; and the weights alone."""
    weights = 4 * parameters / GIB
    training = weights * (1 + len(config.ema.decays)) + 4 * state_numbers(table) / GIB
    return {
        "training": training,
        "kept": training * config.run.keep_last,
        "ema_weights": weights,
        "bf16_weights": weights / 2,
    }


def estimate(config: TrainConfig, cluster: Cluster, simulated: Profile | None = None) -> dict[str, Any]:
    """All figures of the page, as data for JSON. simulated: a profile of this config, where there is one already.
    Raises ConfigError where the number of GPUs does not fit the config."""
    resolved = resolve(config, cluster.gpus)
    table = build_mup_table(config)
    simulated = simulated or profile(config, cluster.gpus)
    encoders = encoder_bytes(config)
    online = Memory(simulated, table, sum(encoders.values()), config.parallel)
    cached = Memory(simulated, table, 0, config.parallel)
    if config.train.micro_batch_size is None:
        config = _with_micro_batch(config, resolved, (online, cached), cluster.usable)
        resolved = resolve(config, cluster.gpus)
    rows = resolved.micro_batch_rows
    count = micro_batches(config, cluster.gpus, rows)
    work = Work(config)
    parameters = work.parameters
    text_flops = text_encoder_flops(config)
    recomputed = work.passes(rows).recomputed(config.parallel.activation_checkpointing)
    steps = step_time(config, cluster, work, text_flops), step_time(config, cluster, work)
    moved = steps[1].network
    result = {
        "config": config.run.name,
        "gpus": cluster.gpus,
        "parameters": parameters,
        "flops_per_image": image_flops(config),
        "recompute_flops_per_image": products_flops(recomputed) // rows,
        "text_encoder_flops_per_image": text_flops,
        "muon_flops_per_step": polar_flops(work.muon, config.optim.muon.steps),
        "micro_batch": rows,
        "micro_batches": count,
        "shard": resolved.shard,
        "memory_gib": _placed(config, online, cluster, resolved, count > 1),
        "memory_cached_gib": _placed(config, cached, cluster, resolved, count > 1),
        "host_gib": cached.host(resolved.shard, rows, count > 1) / GIB,
        "collectives": {
            **{
                name: {"calls": each.calls, "gib": each.bytes / GIB, "seconds": each.seconds}
                for name, each in moved.collectives.items()
            },
            "seconds_at_network_rate": moved.seconds,
        },
        "time": timed(config, cluster, steps[0]),
        "time_cached": timed(config, cluster, steps[1]),
        "checkpoint_gib": _checkpoint_gib(config, table, parameters),
        "right_size": size_of_data(config, parameters),
    }
    result["advice"] = advice(config, cluster, result)
    return result


def size_of_data(config: TrainConfig, parameters: int) -> dict[str, float | str]:
    """How the images of a run lie to what right_size finds."""
    best, images = right_size(config), images_of(config)
    return {
        "images_per_parameter": images / parameters,
        "source": best.source,
        "best_parameters": best.parameters,
        "best_images": best.images,
        "best_images_per_parameter": best.images_per_parameter,
    }


def _with_micro_batch(
    config: TrainConfig, resolved: Resolved, memories: tuple[Memory, Memory], usable: int
) -> TrainConfig:
    """The config with the micro-batch that auto takes; without the encoders where it fits only so; the least one
    where nothing fits."""
    share = -(-config.train.global_batch_size // resolved.world_size)
    fitting = (memory.fitting_rows(resolved.shard, share, usable) for memory in memories)
    least = least_rows(config)
    rows = max(least, equal_parts(share, next((rows for rows in fitting if rows >= least), least)))
    train = config.train.model_copy(update={"micro_batch_size": micro_batch_size(config, rows)})
    return config.model_copy(update={"train": train})


def advice(config: TrainConfig, cluster: Cluster, found: dict[str, Any]) -> list[str]:
    """What to do, in words."""
    online, cached = found["memory_gib"], found["memory_cached_gib"]
    checkpointing = config.parallel.activation_checkpointing
    said = []
    if online["fits"]:
        said.append(f"It fits: {online['total']:.1f} of {online['usable']:.1f} GiB.")
    elif cached["fits"]:
        said.append("It fits only without the encoders on the GPU: precompute latents and text states.")
    else:
        said.append(f"It does not fit: {cached['total']:.1f} of {cached['usable']:.1f} GiB even without encoders.")
        kept = keeps_gathered(config, found["parameters"]) and found["micro_batches"] > 1
        if kept and cached["gradients"] > max(cached["activations"], cached["parameters"]):
            said.append(
                "Accumulation keeps whole gradients under parallel.reshard_after_forward=false: set it to true, or "
                "give each GPU its share in one micro-batch."
            )
        elif cached["largest_micro_batch"] >= 1:
            said.append(f"A micro-batch of {cached['largest_micro_batch']} would: train.micro_batch_size.")
        if checkpointing != "full":
            said.append("parallel.activation_checkpointing=full trades activations for recomputation.")
        if found["shard"] < found["gpus"]:
            said.append("parallel.shard=0 shards the weights over all GPUs.")
    arithmetic, network = found["time"]["arithmetic_s"], found["time"]["network_s"]
    if network > arithmetic:
        said.append(
            f"The network is the limit: {network:.2f} s per step beside {arithmetic:.2f} s of arithmetic. A larger "
            "global batch or fewer GPUs would use them better; --plan compares values of parallel.shard."
        )
    elif network > 0.5 * arithmetic:
        said.append(
            f"Traffic ({network:.2f} s per step) hides behind arithmetic ({arithmetic:.2f} s) only if it overlaps."
        )
    until = config.objective.repa_until
    if until is not None and until < config.train.steps:
        less = 1 - image_flops(config, aligned=False) / found["flops_per_image"]
        said.append(
            f"All steps are priced with REPA; those from objective.repa_until={until} on cost {less:.1%} fewer FLOPs, "
            "and nothing of its encoder."
        )
    if config.parallel.engine == "zero":
        said.append(
            f"Activations and traffic are those of parallel.engine=fsdp2; weights, gradients and buffers follow from "
            f"the rules of ZeRO-{config.parallel.zero_stage} with DeepSpeed's default buffers, not from a simulation."
        )
    if online["fits"] and checkpointing != "none":
        said.append("Try parallel.activation_checkpointing=none in another estimate: what fits without is faster.")
    return said


def _time_line(encoders: str, time: dict[str, Any]) -> str:
    return (
        f"encoders {encoders}: {time['step_s']:.3g} s per step ({time['arithmetic_s']:.3g} s of arithmetic, "
        f"{time['network_s']:.3g} s of network; {time['slower_s']:.3g} s where they overlap, {time['sum_s']:.3g} s "
        f"where not), {time['mfu']:.0%} MFU, {time['images_per_s']:.0f} images/s, {time['days']:.1f} days, "
        f"${time['dollars']:,.0f}"
    )


def describe(found: dict[str, Any], cluster: Cluster) -> str:
    """The page that a person reads, from what `estimate` returned."""
    parts = [part for part in found["memory_gib"] if part not in ("usable", "fits", "largest_micro_batch")][:-1]
    columns = ("memory_gib", "memory_cached_gib")
    lines = [
        f"{found['config']} on {found['gpus']} GPUs of {cluster.card.memory_gb:g} GB: "
        f"{found['parameters'] / 1e9:.2f} B parameters, sharded over {found['shard']}; micro-batch "
        f"{found['micro_batch']} x {found['micro_batches']} per GPU",
        f"FLOPs per image: {found['flops_per_image'] / 1e12:.2f} T (forward and backward), "
        f"+ {found['recompute_flops_per_image'] / 1e12:.2f} T recomputed, "
        f"+ {found['text_encoder_flops_per_image'] / 1e12:.2f} T text encoder when online",
        *([f"Muon: {muon / 1e12:.2f} T per step over all GPUs"] if (muon := found["muon_flops_per_step"]) else []),
        "",
        f"{'GiB per GPU, at the peak':<28}{'online':>10}{'cached':>10}",
        *(f"{part.replace('_', ' '):<28}" + "".join(f"{found[c][part]:10.2f}" for c in columns) for part in parts),
        f"{'usable':<28}" + "".join(f"{found[c]['usable']:10.2f}" for c in columns),
        f"{'largest micro-batch':<28}" + "".join(f"{found[c]['largest_micro_batch']:10d}" for c in columns),
    ]
    for card in found["memory_gib"]["smallest_gpus"]:
        fewest = [found[c]["smallest_gpus"][card] for c in columns]
        texts = ["none" if f is None else f"{f['gpus']} (x {f['micro_batch']})" for f in fewest]
        lines.append(f"{'fewest GPUs of ' + card.replace('_gb', ' GB'):<28}" + "".join(f"{t:>10}" for t in texts))
    if found["host_gib"]:
        lines.append(f"{'in the host, for each GPU':<28}{found['host_gib']:10.2f}{found['host_gib']:10.2f}")
    moved = [
        f"{entry['gib']:.1f} GiB by {entry['calls']} {name}"
        for name, entry in found["collectives"].items()
        if isinstance(entry, dict)
    ]
    lines += [
        "",
        f"received per GPU and step: {', '.join(moved) or 'nothing'}; "
        f"{found['collectives']['seconds_at_network_rate']:.2f} s",
        "MODEL, not measured on any GPU:",
        *(_time_line(name, found[key]) for name, key in (("online", "time"), ("cached", "time_cached"))),
        describe_size(found["right_size"]),
        "checkpoint: "
        + ", ".join(f"{name.replace('_', ' ')} {size:.1f} GiB" for name, size in found["checkpoint_gib"].items()),
        "",
        *found["advice"],
    ]
    return "\n".join(lines)
