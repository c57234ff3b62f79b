"""The train command: shards in, LoRA or fine-tuned transformer out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcache.cache.reader import CacheReader
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.config import TrainConfig
from cogcache.config_io import save_config
from cogcache.progress import say
from cogcache.train.adapter import continue_from
from cogcache.train.checkpoints import Checkpoint
from cogcache.train.data import Samples
from cogcache.train.devices import open_accelerator, product_ceiling, set_matmul_precision
from cogcache.train.holdout import split_holdout
from cogcache.train.loop import Trainer
from cogcache.train.memory.outcome import outcome, typical_seconds
from cogcache.train.memory.place import load_blocks, place_blocks, plan_blocks
from cogcache.train.metrics import METRICS_FILE, check_trackers
from cogcache.train.model import base_dtype, load_scheduler
from cogcache.train.run import (
    check_resume,
    claim_output,
    fetch_base,
    output_folder,
    provenance_of,
    resolve_base,
    run_record,
)
from cogcache.train.startup import Startup, import_libraries, keep_compilations
from cogcache.train.tuning import tuning_for
from cogcache.train.validation import Validator, VideoShape, check_validation, wants_videos

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    ``weights`` is the LoRA file, or the folder of the fine-tuned transformer; ``loss`` is that of the last step,
    None if all steps were already done.
    """

    weights: Path
    output: Path
    steps: int
    loss: float | None

    @property
    def lora(self) -> Path:
        """``weights`` by the name that fits most runs."""
        return self.weights


def train(config: TrainConfig, *, begun: float = 0.0) -> TrainResult:
    """Train a LoRA, or all weights, on a cache and write them, with metrics and checkpoints, to the output folder.

    The result is a function of the settings, the cache and the base model alone: stopping and resuming at any
    step changes nothing (bit for bit on the CPU).

    Args:
        begun: Seconds that imports and the rest of the process have taken so far.

    Raises:
        CogcacheError: one of its kinds, for everything that can be wrong with settings, cache, model or disk.
        StoppedError: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    startup = Startup(begun)
    check_trackers(config)
    with startup.part("data"):
        reader = CacheReader(config.shards, _remote(config))
        training, held_out = split_holdout(reader.samples, config)
        check_validation(config, reader, held_out)
    root, model_id, variant = resolve_base(config, reader.manifest)
    config = continue_from(config, variant, root, model_id)
    samples = Samples(reader, variant, config, training)
    with startup.part("imports"):
        import_libraries()
    with startup.part("GPU"):
        accelerator = open_accelerator(config)
    expected = base_dtype(root, config.dtype, variant, fetched=False)
    placement = plan_blocks(
        config, accelerator, root, samples, expected
    )  # refuses before weights are fetched
    root = fetch_base(model_id, decoder=wants_videos(config, reader))
    dtype = base_dtype(root, config.dtype, variant)
    if dtype != expected:
        placement = plan_blocks(config, accelerator, root, samples, dtype)
    in_8_bits = placement.measures is not None and placement.measures.storage == "int8"
    config = config.model_copy(
        update={
            "model": model_id,
            "output": output_folder(config),
            "dtype": str(dtype).removeprefix("torch."),
            "base_storage": "int8" if in_8_bits else config.base_storage,
        }
    )
    run = run_record(config, reader.manifest, accelerator.num_processes, held_out)
    output, checkpoint = claim_output(config)
    if checkpoint:
        check_resume(checkpoint, run, config)
    accelerator.wait_for_everyone()  # nobody writes before all have looked at the folder

    provenance = provenance_of(model_id, variant, reader.manifest, samples.records)
    tuning = tuning_for(config, provenance, accelerator.device, dtype)
    with startup.part("GPU"):
        ceiling = product_ceiling(accelerator.device)
    if placement.compiled:
        keep_compilations()
    with startup.part("weights"):
        transformer = load_blocks(placement, config, root, tuning.held_in, accelerator.device)
    with startup.part("placing"):
        tuning.prepare(transformer)
        set_matmul_precision(accelerator.device, dtype)
        measures = place_blocks(placement, config, transformer, accelerator.device)
    scheduler = load_scheduler(root)
    validator = Validator(
        config,
        accelerator,
        transformer,
        scheduler,
        reader,
        held_out,
        variant=variant,
        root=root,
        output=output,
        dtype=dtype,
        shape=VideoShape.of(provenance, variant, reader),
    )
    trainer = Trainer(
        config,
        accelerator,
        transformer,
        scheduler,
        samples,
        dtype=dtype,
        output=output,
        run=run,
        tuning=tuning,
        validator=validator,
        measures=measures,
        compiled=placement.compiled,
        ceiling=ceiling,
    )
    if checkpoint:
        trainer.restore(checkpoint)
    if accelerator.is_main_process:
        _announce(config, output, checkpoint)
        save_config(config, output / "config.yaml")
        say(startup.line())
    loss = trainer.train()
    if accelerator.is_main_process:
        tuning.write_result(output, transformer)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        if placement.forecast and loss is not None:
            begun = checkpoint.state.step if checkpoint else 0
            seconds = typical_seconds(output / METRICS_FILE, begun)
            say(outcome(placement.forecast, accelerator.device, seconds))
        say(f"Done after {config.steps} steps: {output / tuning.result}")
    return TrainResult(output / tuning.result, output, config.steps, loss)


def _remote(config: TrainConfig) -> RemoteOptions:
    limit = int(config.remote_cache_size * 1e9)
    return RemoteOptions(config.remote_cache, limit, config.remote_patience * 60)


def _announce(config: TrainConfig, output: Path, checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        if checkpoint.state.step == config.steps:
            say(f"All {config.steps} steps are done already; raise --steps to go on.")
            return
        say(f"Going on after step {checkpoint.state.step} of {config.steps}, in {output}.")
    elif config.resume:
        say(f"NOTICE: {output} holds no checkpoint yet; starting from the beginning.")
    else:
        say(f"Training {config.steps} steps into {output}.")
