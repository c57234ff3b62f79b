"""What a run's steps will take in each memory tier: known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogcache.config import TrainConfig
from cogcache.geometry import Bucket
from cogcache.train.adapter import peft_config
from cogcache.train.flops import StepFlops, mean_flops, step_flops
from cogcache.train.memory.estimate import Estimate, Need, estimate
from cogcache.train.memory.host import COPIES_SHARE
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.speed import Rates, microbatch_seconds, update_seconds
from cogcache.train.memory.workload import Workload, workload_of
from cogcache.variants import Variant

__all__ = ["Forecast", "Job", "compiles", "fits_host", "host_parts", "shortfall", "unloaded_transformer"]

_DEVICE_SHARE, _HOST_SHARE = 0.94, 0.85
"""What of the free memory is planned with: the allocator's gaps and other programs need the rest."""
_COPIED = 3
"""Of each trained parameter a checkpoint holds the weight and AdamW's two moments."""


def unloaded_transformer(facts: Mapping[str, Any], config: TrainConfig, dtype: torch.dtype) -> Any:
    """The transformer that a run would train, on the meta device: shapes alone.

    Args:
        facts: ``transformer/config.json`` of the checkpoint.
        dtype: What the base is held in; all that is trained is float32 in the end.

    Raises:
        ConfigError: naming the target modules that match no layer.
    """
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    full = config.training_type == "full"
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(dict(facts)).requires_grad_(full)
        for tensor in transformer.state_dict(
            keep_vars=True
        ).values():  # computed positions stay as they are made
            tensor.data = tensor.data.to(torch.float32 if full else dtype)
        if not full:
            transformer.add_adapter(peft_config(transformer, config))
    if config.gradient_checkpointing is not False:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


@dataclass(frozen=True)
class Forecast:
    """One tier's steps. Memory is that of the largest bucket.

    Attributes:
        measures: None for diffusers' own blocks.
        compiled: Whether the blocks are compiled.
        flops: Of one microbatch, on the mean over all clips.
        seconds: A step of each bucket; empty where no rates are known.
        typical_s: A step of the bucket that most clips are in, or of one in the middle.
        mean_s: A step, on the mean over all clips.
        copies: Bytes of page-locked host memory for a checkpoint's copies, where there is room: :func:`host_parts`.
        given_up: What was given up of the tier because the host's memory is short, in words.
    """

    tier: str
    measures: Measures | None
    memory: Estimate
    flops: StepFlops
    seconds: Mapping[Bucket, float]
    typical_s: float | None
    mean_s: float | None
    copies: int = 0
    compiled: bool = False
    given_up: str = ""


@dataclass(frozen=True)
class Job:
    """What decides the memory and the time of a run's steps, but for the tier.

    Attributes:
        transformer: Holds what is trained; shapes alone are looked at.
        clips: How many are in each bucket.
        compute: The dtype of tokens.
        processes: Among which a step's samples are dealt; each has a GPU of its own.
    """

    transformer: Any
    variant: Variant
    clips: Mapping[Bucket, int]
    config: TrainConfig
    compute: torch.dtype
    processes: int = 1

    def forecast(self, tier: str, measures: Measures | None, rates: Rates | None = None) -> Forecast:
        """What ``tier`` takes.

        Args:
            measures: Those of the tier; None for diffusers' own blocks.
            rates: Of the GPU; without, and in float32, no time is told.
        """
        checkpointing = bool(self.transformer.gradient_checkpointing)
        accumulates = self.config.grad_accum > 1 or self.processes > 1
        load = self._load(*self.clips)
        memory = estimate(
            load,
            measures,
            checkpointing=checkpointing,
            compiled=compiles(measures, self.config),
            gradients_stay=accumulates,
        )
        flops = {bucket: self._flops(bucket, measures) for bucket in sorted(self.clips)}
        seconds = {}
        if rates is not None and self.compute != torch.float32:
            seconds = {bucket: self._step_seconds(bucket, flops[bucket], measures, rates) for bucket in flops}
        return Forecast(
            tier,
            measures,
            memory,
            mean_flops([(flops[bucket], count) for bucket, count in self.clips.items()]),
            seconds,
            _middle(seconds, self.clips) if seconds else None,
            _mean(seconds, self.clips) if seconds else None,
            _COPIED * load.locked if self.config.checkpoint_every else 0,
            compiles(measures, self.config),
        )

    @property
    def unit(self) -> int:
        """Bytes of one block's tokens in the largest bucket: the largest tensor that is kept."""
        return self._load(*self.clips).unit

    @property
    def largest(self) -> Bucket:
        """The bucket with the most tokens."""
        return max(self.clips, key=lambda bucket: self.variant.video_tokens(bucket.frames, bucket.size))

    def _load(self, *buckets: Bucket) -> Workload:
        return workload_of(self.transformer, self.variant, buckets, self.config.batch_size, self.compute)

    def _flops(self, bucket: Bucket, measures: Measures | None) -> StepFlops:
        return step_flops(self.transformer, self.variant, bucket, self.config.batch_size, measures)

    def _step_seconds(
        self, bucket: Bucket, flops: StepFlops, measures: Measures | None, rates: Rates
    ) -> float:
        load = self._load(bucket)
        micro = microbatch_seconds(
            load,
            flops,
            measures,
            rates,
            checkpointing=bool(self.transformer.gradient_checkpointing),
            compiled=compiles(measures, self.config),
        )
        return self.config.grad_accum * micro + update_seconds(load, measures, rates)


def _middle(seconds: Mapping[Bucket, float], clips: Mapping[Bucket, int]) -> float:
    """The median over all clips."""
    seen, half = 0, sum(clips.values()) / 2
    for bucket in sorted(seconds, key=lambda bucket: seconds[bucket]):
        seen += clips[bucket]
        if seen >= half:
            return seconds[bucket]
    raise AssertionError("no clips")


def _mean(seconds: Mapping[Bucket, float], clips: Mapping[Bucket, int]) -> float:
    return sum(seconds[bucket] * count for bucket, count in clips.items()) / sum(clips.values())


def compiles(measures: Measures | None, config: TrainConfig) -> bool:
    """Whether blocks are compiled under ``measures``; None for diffusers' own, which are where it is asked for."""
    return bool(config.compile) if measures is None else measures.compile


def fits_host(memory: Estimate, free: Need) -> bool:
    """Whether the host's free memory is enough."""
    return max(memory.host, memory.loading) <= _HOST_SHARE * free.host


def shortfall(memory: Estimate, free: Need) -> str:
    """What is missing of the free memory, in words; empty if it fits."""
    missing = []
    if memory.device > _DEVICE_SHARE * free.device:
        usable = _gib(_DEVICE_SHARE * free.device)
        missing.append(f"{_gib(memory.device)} GiB of GPU memory where {usable} may be used")
    if not fits_host(memory, free):
        host = max(memory.host, memory.loading)
        missing.append(f"{_gib(host)} GiB of host memory where {_gib(_HOST_SHARE * free.host)} may be used")
    return " and ".join(missing)


def host_parts(forecast: Forecast, free: Need | None = None) -> dict[str, int]:
    """What is page-locked on the host by part, bytes: the tier's, and ``checkpoint_copies``.

    Those never keep a tier out: without room for them none are made.

    Args:
        free: Memory before anything is loaded; None: there is room.
    """
    room = free is None or forecast.copies <= COPIES_SHARE * (free.host - forecast.memory.host)
    return {**forecast.memory.host_parts, "checkpoint_copies": forecast.copies if room else 0}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
