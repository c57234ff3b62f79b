"""A plan as one JSON value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cogcache.config import TrainConfig
from cogcache.planner.costs import disk_of, encode_seconds, encodes_in_tiles
from cogcache.planner.subject import Clips, Model
from cogcache.planner.target import Target
from cogcache.train.flops import Flops, StepFlops
from cogcache.train.memory.forecast import Forecast, Job, host_parts, shortfall

__all__ = ["VERSION", "describe"]

VERSION = 2
"""Of the JSON: raised when a field changes its meaning or goes."""
_COMPILES_S = 40.0
"""What the first step of a bucket takes longer where blocks are compiled, on an H200's host, nothing cached."""


def describe(
    model: Model, clips: Clips, job: Job, plans: Sequence[tuple[Target, Sequence[Forecast]]], image_draws: int
) -> dict[str, Any]:
    """Everything that is planned, in bytes, seconds and operations.

    Args:
        plans: For each target what the tiers take, ``plain`` first.
    """
    config = job.config
    targets = [_target(model, clips, job, target, found, image_draws) for target, found in plans]
    return {
        "version": VERSION,
        "fits": any(target["auto"] for target in targets),
        "model": _model(model, job),
        "settings": {
            name: getattr(config, name)
            for name in ("training_type", "rank", "target_modules", "batch_size", "grad_accum", "steps")
        },
        "clips": _clips(clips, job),
        "disk": _disk(model, clips, image_draws),
        "targets": targets,
    }


def _model(model: Model, job: Job) -> dict[str, Any]:
    parameters = list(job.transformer.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    full = job.config.training_type == "full"
    return {
        "name": model.name,
        "task": model.variant.task,
        "dtype": str(job.compute).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters) - (0 if full else trained),
        "trained": trained,
    }


def _clips(clips: Clips, job: Job) -> dict[str, Any]:
    buckets = [
        {
            "bucket": str(bucket),
            "clips": count if clips.known else None,
            "video_tokens": job.variant.video_tokens(bucket.frames, bucket.size),
            "text_tokens": job.variant.text_length,
        }
        for bucket, count in sorted(clips.buckets.items())
    ]
    total = sum(clips.buckets.values()) if clips.known else None
    config = job.config
    epochs = config.steps * config.batch_size * config.grad_accum / total if total else None
    return {"total": total, "epochs": epochs, "buckets": buckets, "memory_is_that_of": str(job.largest)}


def _disk(model: Model, clips: Clips, image_draws: int) -> dict[str, Any]:
    disk = disk_of(model.variant, clips, image_draws)
    count = sum(clips.buckets.values())
    return {
        **asdict(disk),
        "together": disk.together,
        "a_clip": disk.together // count,
        "of": count,
        "stored": dict(clips.stored) if clips.stored is not None else None,
    }


def _target(
    model: Model, clips: Clips, job: Job, target: Target, forecasts: Sequence[Forecast], image_draws: int
) -> dict[str, Any]:
    taken = next(
        (one for one in forecasts if one.tier != "plain" and not shortfall(one.memory, target.free)), None
    )
    if job.config.training_type == "full" or job.config.lora_dropout:
        taken = next((one for one in forecasts if not shortfall(one.memory, target.free)), None)
    return {
        "name": target.name,
        "gpu_free": target.free.device,
        "host_free": target.free.host if target.host_known else None,
        "rates": asdict(target.rates) if target.rates else None,
        "times_are": "measured rates" if target.measured else "estimates",
        "auto": taken.tier if taken else None,
        "tiers": [_tier(forecast, target, job.config) for forecast in forecasts],
        "encode_s": encode_seconds(model, clips, image_draws, target) if clips.stored is None else 0.0,
        "encode_tiled": clips.stored is None and encodes_in_tiles(model, clips, target),
        "run_s": _run_seconds(taken, job) if taken else None,
    }


def _tier(forecast: Forecast, target: Target, config: TrainConfig) -> dict[str, Any]:
    memory = forecast.memory
    missing, host = shortfall(memory, target.free), host_parts(forecast, target.free)
    return {
        "tier": forecast.tier,
        "measures": asdict(forecast.measures) if forecast.measures else None,
        "given_up": forecast.given_up,
        "gpu": {**memory.device_parts, "together": memory.device},
        "host": {**host, "together": sum(host.values()), "while_loading": memory.loading},
        "flops": _flops(forecast.flops, config.grad_accum),
        "seconds": forecast.mean_s,
        "seconds_by_bucket": {str(bucket): seconds for bucket, seconds in forecast.seconds.items()},
        "fits": not missing,
        "missing": missing,
    }


def _flops(flops: StepFlops, times: int) -> dict[str, Any]:
    """Of a whole step, on the mean over all clips."""

    def both(part: Flops) -> dict[str, int]:
        return {"linear": times * part.linear, "attention": times * part.attention}

    return {
        "forward": both(flops.forward),
        "backward": both(flops.backward),
        "recomputed": both(flops.recomputed),
    }


def _run_seconds(forecast: Forecast, job: Job) -> float | None:
    if forecast.mean_s is None:
        return None
    return job.config.steps * forecast.mean_s + _COMPILES_S * len(job.clips) * forecast.compiled
