"""What ``cogcache plan`` does: gather, forecast, tell."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogcache.cache.files import make_folder, storage_errors
from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.config_io import load_config
from cogcache.errors import NothingFitsError
from cogcache.models import torch_dtype
from cogcache.planner.report import describe
from cogcache.planner.subject import Model, clips_of, find_model
from cogcache.planner.target import choose_targets
from cogcache.planner.text import as_text
from cogcache.quiet import quiet_libraries
from cogcache.tiny.families import Family
from cogcache.train.memory.choose import Variants, candidates, forecasts
from cogcache.train.memory.forecast import Job, unloaded_transformer

__all__ = ["PlanRequest", "plan"]

_NO_SHARDS = "none"


@dataclass(frozen=True)
class PlanRequest:
    """The command's flags, see its help. ``training`` are settings of ``cogcache train``."""

    model: str | None = None
    family: Family | None = None
    shards: str | None = None
    bucket: list[str] = field(default_factory=list)
    frames: int | None = None
    size: str | None = None
    clips: int | None = None
    image_draws: int = 8
    gpu: str | None = None
    gpu_memory: float | None = None
    gpu_tflops: float | None = None
    link: float | None = None
    host_memory: float | None = None
    config: Path | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def plan(request: PlanRequest, json_out: str | None = None) -> None:
    """Print a plan, and write it as JSON where asked; with ``-`` JSON alone is printed.

    Raises:
        ConfigError, ModelError, CacheError, GeometryError: if settings, model, shards or shapes are wrong.
        StorageError: if the JSON cannot be written.
        NothingFitsError: after all that, if nothing fits; of several cards, none.
    """
    value, text = make_plan(request)
    _tell(text, json.dumps(value, indent=2) + "\n", json_out)
    if not value["fits"]:
        names = ", ".join(target["name"] for target in value["targets"])
        raise NothingFitsError(
            f"nothing fits into the memory that is planned with ({names}).",
            "Fewer frames, a smaller size, --batch-size 1 or a lower --rank need less.",
        )


def _tell(text: str, content: str, json_out: str | None) -> None:
    if json_out == "-":
        sys.stdout.write(content)
        return
    sys.stdout.write(text + "\n")
    if json_out is not None:
        path = Path(json_out)
        make_folder(path.absolute().parent)
        with storage_errors(path):
            path.write_text(content, "utf-8")


def make_plan(request: PlanRequest) -> tuple[dict[str, Any], str]:
    """The plan as a JSON value and as text."""
    shards = CacheReader(request.shards) if request.shards is not None else None
    settings = {**request.training, "shards": request.shards or _NO_SHARDS}
    config = load_config(TrainConfig, settings, request.config)
    model = find_model(request.model, request.family, shards)
    clips = clips_of(model.variant, shards, request.bucket, request.frames, request.size, request.clips)
    targets = choose_targets(
        request.gpu, request.gpu_memory, request.gpu_tflops, request.link, request.host_memory
    )
    job = _job(model, config, clips.buckets)
    tiers = _tiers(config)
    plans = [(target, forecasts(job, tiers, target.rates, target.free)) for target in targets]
    value = describe(model, clips, job, plans, request.image_draws)
    value["clips"]["encoded_for_this_model"] = (
        shards is None or shards.manifest.model.variant == model.variant
    )
    return value, as_text(value, plans)


def _job(model: Model, config: TrainConfig, buckets: Mapping[Any, int]) -> Job:
    dtype = torch_dtype(model.dtype if config.dtype == "auto" else config.dtype)
    with quiet_libraries():
        transformer = unloaded_transformer(model.transformer, config, dtype)
    return Job(transformer, model.variant, buckets, config, dtype)


def _tiers(config: TrainConfig) -> list[tuple[str, Variants]]:
    """Plain blocks and, where they can be had, all tiers."""
    plain: list[tuple[str, Variants]] = [("plain", [None])]
    if config.training_type == "full" or config.lora_dropout:
        return plain
    return [*plain, *candidates(config.model_copy(update={"memory": "auto"}))]
