"""What a run is, and what may change when it goes on: the rules of the output folder and of ``--resume``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogcache.cache.files import make_folder
from cogcache.cache.format import Manifest, SampleRecord, differences
from cogcache.config import TrainConfig
from cogcache.decode import check_decoder
from cogcache.errors import CheckpointError, ConfigError, MismatchError
from cogcache.finetuned import TRANSFORMER_FOLDER
from cogcache.geometry import Size
from cogcache.hashing import file_sha256
from cogcache.location import folder_name
from cogcache.lora import LORA_FILE_NAME, Provenance, read_lora_header
from cogcache.models import Component, resolve_model
from cogcache.train.checkpoints import Checkpoint, find_checkpoint, list_checkpoints
from cogcache.train.holdout import describe
from cogcache.train.metrics import METRICS_FILE
from cogcache.variants import Variant, read_variant

__all__ = [
    "FREE_FIELDS",
    "check_resume",
    "claim_output",
    "fetch_base",
    "output_folder",
    "provenance_of",
    "resolve_base",
    "run_record",
]

FREE_FIELDS = frozenset(
    {
        "shards", "remote_cache", "remote_cache_size", "remote_patience",
        "output", "model", "resume", "steps", "batch_size", "grad_accum", "checkpoint_every",
        "keep_checkpoints", "log_every", "report_to", "workers", "device", "gradient_checkpointing",
        "memory", "keep_attention", "keep_inputs", "base_weights", "in_parts", "optimizer_state",
        "compile",
        "holdout", "validate_every", "validate_at_start",
        "sample_videos", "sample_steps", "sample_guidance", "sample_seed",
    }
)  # fmt: skip
"""Settings that may differ when a run goes on.

Shards are compared by content, batch sizes by their product, what is held out by the clips; ``steps`` where the
learning rate depends on them.
"""


_RESULTS = {LORA_FILE_NAME: "LoRA", TRANSFORMER_FOLDER: "transformer"}
"""What a run leaves in its output folder when it is done, of either training type."""


def output_folder(config: TrainConfig) -> Path:
    """Where the run writes: as given, or ``runs/<name of the shards>``."""
    return config.output or Path("runs") / folder_name(config.shards)


def resolve_base(config: TrainConfig, manifest: Manifest) -> tuple[Path, str, Variant]:
    """The base model's folder, its id and its facts, which must be those the cache was made with.

    Of a model on the hub, only config files are fetched: :func:`fetch_base` gets the rest.

    Raises:
        ModelError: if the model is not there.
        MismatchError: if ``--model`` is of another kind than the cache's model.
    """
    name = config.model or manifest.model.id
    root = resolve_model(name, ())
    variant = read_variant(root)
    wrong = differences(_facts(manifest.model.variant), _facts(variant))
    if wrong:
        raise MismatchError(
            f"{name} is not the kind of model that {config.shards} was encoded for ({manifest.model.id}).",
            wrong,
            "Leave --model out, or encode again for this model.",
        )
    return root, str(root.resolve()) if Path(name).expanduser().is_dir() else name, variant


def fetch_base(model_id: str, *, decoder: bool = False) -> Path:
    """The folder of the base model with all that training reads; with ``decoder``, the VAE's weights, too.

    Raises:
        ModelError: if a part is missing, or cannot be fetched.
    """
    parts: tuple[Component, ...] = ("transformer", "scheduler")
    root = resolve_model(model_id, (*parts, "vae") if decoder else parts)
    if decoder:
        check_decoder(root)
    return root


def _facts(variant: Variant) -> dict[str, Any]:
    return {**variant.model_dump(), "task": variant.task}


def provenance_of(
    base_model: str, variant: Variant, manifest: Manifest, records: Sequence[SampleRecord]
) -> Provenance:
    """What inference needs to know about a run's result; frames, size and fps are those of most clips."""
    clips = Counter((r.frames, str(Size(r.height, r.width)), r.fps) for r in records)
    frames, size, fps = clips.most_common(1)[0][0]
    return Provenance(
        base_model=base_model,
        variant=variant,
        fingerprint=manifest.fingerprint(),
        frames=frames,
        size=size,
        fps=fps,
    )


def run_record(
    config: TrainConfig, manifest: Manifest, processes: int, held_out: Sequence[SampleRecord] = ()
) -> dict[str, Any]:
    """Everything that decides the numbers of a run, flat."""
    settings = config.model_dump(mode="json", exclude=set(FREE_FIELDS))
    if settings["base_storage"] != "int8":
        del settings["base_storage"]  # as in checkpoints from before there was a choice
    if config.init_lora is not None:
        settings["init_lora"] = file_sha256(read_lora_header(config.init_lora).file)
    if config.lr_scheduler != "constant":
        settings["steps"] = config.steps  # the schedule ends there, so every learning rate depends on it
    return {
        **settings,
        "global_batch": config.batch_size * config.grad_accum * processes,
        "shards_fingerprint": manifest.fingerprint(),
        "held_out": describe(held_out),
    }


def check_resume(checkpoint: Checkpoint, run: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse a checkpoint of another run, field by field.

    Raises:
        MismatchError: naming each field that differs.
        CheckpointError: if the checkpoint is already past ``--steps``.
    """
    wrong = differences(checkpoint.state.run, json.loads(json.dumps(run)))
    if wrong:
        raise MismatchError(
            f"the checkpoint of step {checkpoint.state.step} is of another run.",
            wrong,
            "Give the settings it was made with, or start anew in another --output.",
        )
    if checkpoint.state.step > config.steps:
        raise CheckpointError(
            f"the checkpoint is at step {checkpoint.state.step}, past --steps {config.steps}.",
            "Raise --steps, or resume from an earlier checkpoint.",
        )


def claim_output(config: TrainConfig) -> tuple[Path, Checkpoint | None]:
    """Prepare the output folder and find the checkpoint to go on from.

    A folder that already holds a run is never written over: without ``--resume`` it is refused. ``--resume
    latest`` where no checkpoint exists yet starts from the beginning (the caller says so loudly), so that one
    command can be repeated until the run is done; a *named* checkpoint that is missing is an error.

    Raises:
        ConfigError: if the folder holds a run and ``--resume`` is not about it, or a finished LoRA and no
            checkpoint.
        CheckpointError: if the checkpoint is missing or damaged.
    """
    output = output_folder(config)
    if not _goes_on_in(output, config.resume):
        _refuse_used(output)
    checkpoint = find_checkpoint(output, config.resume) if config.resume else None
    finished = [what for name, what in _RESULTS.items() if (output / name).exists()]
    if checkpoint is None and finished:
        raise ConfigError(
            f"{output} holds a finished {finished[0]} and no checkpoint to go on from.",
            "Choose another --output.",
        )
    make_folder(output)
    return output, checkpoint


def _goes_on_in(output: Path, resume: str | None) -> bool:
    """Whether ``--resume`` names a checkpoint of this very folder."""
    return resume == "latest" or (resume is not None and Path(resume).resolve().parent == output.resolve())


def _refuse_used(output: Path) -> None:
    traces = [*(output / name for name in _RESULTS), output / METRICS_FILE, *list_checkpoints(output)]
    found = [path.name for path in traces if path.exists() and path.stat().st_size]
    if found:
        raise ConfigError(
            f"{output} already holds a run ({', '.join(found)}).",
            "Add --resume latest to go on with that run, or choose another --output.",
        )
