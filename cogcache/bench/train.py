"""``cogcache bench train``: a training step of each memory tier beside the reference recipe's.

Each row runs in a process of its own, so that no memory of another counts and none ends the others; all rows follow
each other in one run of the command.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogcache.bench.card import cap_gpu_memory
from cogcache.bench.group_offload import offload_groups
from cogcache.bench.real import real_transformer
from cogcache.bench.recipes import RECIPES, Recipe
from cogcache.config import TrainConfig
from cogcache.geometry import Bucket
from cogcache.tiny import Family
from cogcache.train.devices import set_matmul_precision
from cogcache.train.flops import step_flops
from cogcache.train.memory.blocks import install
from cogcache.train.memory.estimate import estimate
from cogcache.train.memory.gpus import find_card
from cogcache.train.memory.speed import microbatch_seconds, update_seconds
from cogcache.train.memory.stock import compile_blocks
from cogcache.train.memory.workload import workload_of
from cogcache.train.model import add_lora, trainable
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.train.optimizer import make_optimizer
from cogcache.variants import Variant

__all__ = ["FailedRow", "RowSettings", "StepRow", "measure_step", "rows"]

_WARM_UP = 2


@dataclass(frozen=True)
class RowSettings:
    """One row: ``recipe`` is a name of :data:`~cogcache.bench.recipes.RECIPES`; ``gpu_memory`` in GiB is the most that
    it may take."""

    recipe: str
    family: Family
    bucket: str
    batch_size: int
    rank: int
    steps: int
    gpu_memory: float | None = None


@dataclass(frozen=True)
class StepRow:
    """What a row gave. Memory in GiB at the peak of the measured steps.

    ``predicted_*`` is what the planner expects; no time where the GPU is not one that it knows, and nothing for group
    offloading, which it does not know.
    ``first_step_s`` holds the compilation. ``steps`` were timed, ``step_s`` is their mean.
    """

    recipe: str
    batch_size: int
    steps: int
    step_s: float
    predicted_s: float | None
    peak_gib: float
    predicted_gib: float | None
    first_step_s: float
    loss: float


@dataclass(frozen=True)
class FailedRow:
    """A row that gave no figures, and why: the error's own line."""

    recipe: str
    failed: str


def rows(settings: list[RowSettings]) -> Iterator[StepRow | FailedRow]:
    """Measure each in a process of its own."""
    for one in settings:
        command = [sys.executable, "-m", "cogcache.bench.train", json.dumps(asdict(one))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            yield FailedRow(one.recipe, _reason(done.stderr, done.returncode))
        else:
            yield StepRow(**json.loads(lines[-1]))


def _reason(stderr: str, code: int) -> str:
    """The last line that names an error; else the last; else how the process ended."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [f"ended with code {code} and no word", *lines[-1:], *errors[-1:]][-1]


def measure_step(settings: RowSettings) -> StepRow:
    """Time optimizer steps and take their peak of memory, which only a GPU tells."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPES[settings.recipe]
    native = torch.float16 if settings.family == "2b" else torch.bfloat16
    transformer, variant = real_transformer(
        settings.family, torch.float32 if recipe.autocast else native, device
    )
    config = TrainConfig(shards=Path("unused"), rank=settings.rank)
    set_matmul_precision(device, native)
    _prepare(transformer, config, recipe, device)
    # Not before: the model was made on the GPU whole, where training reads it in parts.
    cap_gpu_memory(settings.gpu_memory)
    predicted_s, predicted_gib = _predicted(transformer, variant, recipe, settings, native)
    on_host = recipe.measures is not None and recipe.measures.optimizer == "host"
    optimizer = make_optimizer(config, trainable(transformer), on_host=on_host)
    forward = _forward(transformer, variant, settings, device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if recipe.autocast else nullcontext():
            loss = forward()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable(transformer).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    started = time.perf_counter()
    loss = float(step().detach())
    first = time.perf_counter() - started
    for _ in range(_WARM_UP - 1):
        step()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(settings.steps):
        step()
    _wait(device)
    seconds = (time.perf_counter() - started) / settings.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return StepRow(
        recipe=settings.recipe,
        batch_size=settings.batch_size,
        steps=settings.steps,
        step_s=seconds,
        predicted_s=predicted_s,
        peak_gib=peak,
        predicted_gib=predicted_gib,
        first_step_s=first,
        loss=loss,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _prepare(transformer: Any, config: TrainConfig, recipe: Recipe, device: torch.device) -> None:
    """Add the LoRA and let the blocks run as the recipe says."""
    if recipe.offload is not None:
        offload_groups(transformer, recipe.offload, device)
    add_lora(transformer, config)
    if recipe.measures is None:
        transformer.enable_gradient_checkpointing()
        if recipe.compiled:
            compile_blocks(transformer)
        for parameter in trainable(transformer).values():
            parameter.data = parameter.data.to(device)
    else:
        if recipe.measures.weights == "host" and recipe.measures.storage == "native":
            transformer.to("cpu")
        install(transformer, recipe.measures, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _predicted(
    transformer: Any, variant: Variant, recipe: Recipe, settings: RowSettings, dtype: torch.dtype
) -> tuple[float | None, float | None]:
    """Seconds a step, if the GPU is a known one, and GiB at its peak, as the planner has them."""
    if recipe.offload is not None:
        return None, None
    bucket, size, measures = _bucket(settings), settings.batch_size, recipe.measures
    load = workload_of(transformer, variant, [bucket], size, dtype)
    card = find_card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    seconds = None
    if card:
        flops = step_flops(transformer, variant, bucket, size, measures)
        seconds = microbatch_seconds(load, flops, measures, card.rates, compiled=recipe.compiled)
        seconds += update_seconds(load, measures, card.rates)
    return seconds, estimate(load, measures, compiled=recipe.compiled).device / 2**30


def _bucket(settings: RowSettings) -> Bucket:
    frames, height, width = map(int, settings.bucket.split("x"))
    return Bucket(frames, height, width)


def _forward(
    transformer: Any, variant: Any, settings: RowSettings, device: torch.device
) -> Callable[[], Tensor]:
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=variant.snr_shift_scale
    )
    source = torch.Generator(device).manual_seed(0)
    bucket, batch = _bucket(settings), settings.batch_size
    c, f, h, w = variant.latent_shape(bucket.frames, bucket.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=source, device=device)

    values: dict[str, Any] = {
        "noise_bpchw": normal(padded_frames(f, variant.patch_size_t), c, h, w),
        "timesteps_b": torch.full((batch,), 500, device=device),
        "posterior_noise_bcfhw": normal(c, f, h, w),
        "image_latents_bcfhw": normal(c, 1, h, w) if variant.task == "i2v" else None,
    }
    moments, prompts = normal(2 * c, f, h, w), normal(variant.text_length, variant.text_dim)
    return lambda: loss_per_sample(transformer, scheduler, moments, prompts, variant=variant, **values).mean()


if __name__ == "__main__":
    print(json.dumps(asdict(measure_step(RowSettings(**json.loads(sys.argv[1]))))))
