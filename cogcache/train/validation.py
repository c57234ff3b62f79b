"""Validation in the middle of training: a loss on held-out clips, and sample videos, without any encoder.

The loss is measured at fixed timesteps with fixed noise: draws depend on the clip and the timestep alone, not
on the run's seed, so that points of one run and runs with one another compare. Forward passes have one sample
each, so the numbers do not depend on batch sizes or on how many processes share the work.

Nothing of training is touched: weights, random state and mode are as before when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogcache.cache.format import IMAGES, TEXT, SampleRecord, ValidationRecord
from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.draws import generator
from cogcache.errors import ConfigError
from cogcache.geometry import Size, parse_size
from cogcache.lora import Provenance
from cogcache.train.data import Batch, Draws, read_ahead, read_sample
from cogcache.train.metrics import SampledVideo, ValidationResult, validated
from cogcache.train.objective import padded_frames
from cogcache.train.sampling import sample_latents
from cogcache.train.signals import StopRequest
from cogcache.variants import Variant

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SAMPLES_FOLDER", "Validator", "VideoShape", "check_validation", "fixed_timesteps", "wants_videos"]

SAMPLES_FOLDER = "samples"
_BUCKETS = 5


@dataclass(frozen=True)
class VideoShape:
    """Of the sample videos: frames, pixels, frames per second."""

    frames: int
    size: Size
    fps: float

    @classmethod
    def of(cls, clips: Provenance, variant: Variant, reader: CacheReader) -> VideoShape:
        """That of most training clips; at the model's own rate where they keep that of their source.

        Pictures to begin with have one size, which is then that of the videos.
        """
        assert clips.frames
        assert clips.size
        size = _picture_size(reader, variant) or parse_size(clips.size)
        return cls(clips.frames, size, clips.fps or float(variant.native_fps))


def _picture_size(reader: CacheReader, variant: Variant) -> Size | None:
    key = next((row.image for row in reader.validation if row.image), None)
    if key is None:
        return None
    height, width = reader.read(IMAGES, key).tensors["latents"].shape[-2:]
    return Size(height * variant.spatial_factor, width * variant.spatial_factor)


def wants_videos(config: TrainConfig, reader: CacheReader) -> bool:
    """Whether this run samples videos."""
    return bool(config.validate_every and config.sample_videos and reader.validation)


def check_validation(config: TrainConfig, reader: CacheReader, held_out: Sequence[SampleRecord]) -> None:
    """Refuse a validation of nothing.

    Raises:
        ConfigError: if there are neither held-out clips nor prompts.
    """
    if config.validate_every and not held_out and not wants_videos(config, reader):
        raise ConfigError(
            "--validate-every has nothing to validate: no clip is held out and no video is to be sampled.",
            "Add --holdout 5%, or give 'cogcache encode' --validation-prompts.",
        )


def fixed_timesteps(count: int) -> list[int]:
    """The middle of each of five equal parts of ``count`` timesteps: 100, 300, ... 900 of 1000."""
    return [(2 * part + 1) * count // (2 * _BUCKETS) for part in range(_BUCKETS)]


class Validator:
    """Validates a transformer in the middle of its training. All processes call it at the same steps.

    Args:
        transformer: Bare, on the device of ``accelerator``.
        scheduler: The checkpoint's scheduler.
        held_out: Clips for the loss; may be none.
        root: Folder of the base model, whose VAE decodes the videos.
        dtype: What the transformer computes in.
        shape: Of the sample videos.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        transformer: nn.Module,
        scheduler: Any,
        reader: CacheReader,
        held_out: Sequence[SampleRecord],
        *,
        variant: Variant,
        root: Path,
        output: Path,
        dtype: torch.dtype,
        shape: VideoShape,
    ) -> None:
        self.config, self.accelerator, self.transformer = config, accelerator, transformer
        self.scheduler, self.reader, self.held_out = scheduler, reader, held_out
        self.variant, self.root, self.output, self.dtype, self.shape = variant, root, output, dtype, shape
        self.device = accelerator.device
        self.timesteps = fixed_timesteps(variant.num_train_timesteps)
        self.prompts = reader.validation if wants_videos(config, reader) else []

    def due(self, step: int) -> bool:
        """Whether the state after optimizer step ``step`` is to be validated; 0 is before the first."""
        every = self.config.validate_every
        if not every or step == 0:
            return bool(every and self.config.validate_at_start)
        return step % every == 0 or step == self.config.steps

    def missing(self, step: int) -> bool:
        """Whether a resumed run stopped before it had validated ``step``, though it should have."""
        if not self.due(step):
            return False
        known = torch.tensor([float(validated(self.output, step))], device=self.device)
        return not self.accelerator.gather(known)[0].item()  # what the main process finds

    def run(self, step: int, stop: StopRequest) -> ValidationResult:
        """Validate, every process a part; the result is whole in each.

        A signal ends it early: the result is of no use then, and its ``stop`` is the signal's number.
        """
        started = time.perf_counter()
        with _evaluating(self.transformer, self.device):
            losses = self._losses(stop)
            self._sample(step, stop)
        row = torch.cat([losses, losses.new_tensor([stop.number])])
        rows = self.accelerator.gather(row).view(-1, len(row)).cpu()  # after all videos are written
        dealt = rows[:, :-1].T.flatten().tolist()[: len(self.held_out) * len(self.timesteps)]
        return ValidationResult(
            losses={t: dealt[place :: len(self.timesteps)] for place, t in enumerate(self.timesteps)},
            videos=[SampledVideo(self._path(step, n), row.prompt) for n, row in enumerate(self.prompts)],
            stop=int(rows[:, -1].max()),
            seconds=time.perf_counter() - started,
        )

    def _losses(self, stop: StopRequest) -> Tensor:
        """Losses of this process's share of (clip, timestep), float32; zeros at the end where there is none."""
        jobs = [(record, t) for record in self.held_out for t in self.timesteps]
        mine = self._share(jobs)
        losses = torch.zeros(-(-len(jobs) // self.accelerator.num_processes), device=self.device)
        for place, batch in enumerate(read_ahead(lambda job: self._batch(*job), mine, self.config.workers)):
            if stop.number:
                break
            batch = batch.map(lambda tensor: tensor.to(self.device))
            losses[place] = batch.losses(self.transformer, self.scheduler, self.variant, self.dtype)[0]
        return losses

    def _batch(self, record: SampleRecord, timestep: int) -> Batch:
        """One held-out clip at one timestep: its own caption, and the first draw of its image bank."""

        def normal(purpose: str, shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator("validation", record.id, timestep, purpose))

        image = record.images[0] if self.variant.task == "i2v" else None
        draws = Draws(timestep, record.text, image, image_dropped=False, normal=normal)
        row = read_sample(self.reader, self.variant, record, draws)
        return Batch(**{name: tensor[None] for name, tensor in row.items()})

    def _sample(self, step: int, stop: StopRequest) -> None:
        """Sample this process's share of the prompts and write the videos; the VAE is there only for that."""
        mine = self._share(list(enumerate(self.prompts)))
        latents = [(number, self._denoise(number, row, stop)) for number, row in mine if not stop.number]
        if stop.number or not latents:
            return
        from cogcache.decode import open_decoder
        from cogcache.mp4 import write_mp4

        with open_decoder(self.root, self.dtype, self.device, self.shape.size) as decoder:
            for number, latents_fchw in latents:
                if not stop.number:
                    write_mp4(self._path(step, number), decoder.decode(latents_fchw), self.shape.fps)

    def _denoise(self, number: int, prompt: ValidationRecord, stop: StopRequest) -> Tensor:
        """Scaled latents [F, C, H, W] of one prompt, padding dropped, on the CPU.

        The starting noise is that of ``cogcache infer`` with the same seed.
        """
        channels, frames, height, width = self.variant.latent_shape(self.shape.frames, self.shape.size)
        padded = padded_frames(frames, self.variant.patch_size_t)
        source = torch.Generator("cpu").manual_seed(self.config.sample_seed + number)
        noise = torch.randn((1, padded, channels, height, width), generator=source, dtype=self.dtype)
        image = self.reader.read(IMAGES, prompt.image).tensors["latents"][None] if prompt.image else None
        latents_bpchw = sample_latents(
            self.transformer,
            self.scheduler,
            self._embedding(prompt.text),
            self._embedding(self.reader.manifest.unconditional),
            noise_bpchw=noise.to(self.device),
            variant=self.variant,
            steps=self.config.sample_steps,
            guidance=self.config.sample_guidance,
            generator=source,
            image_latents_bcfhw=image,
            go_on=lambda: not stop.number,
        )
        return latents_bpchw[0, padded - frames :].cpu()

    def _embedding(self, key: str) -> Tensor:
        return self.reader.read(TEXT, key).tensors["prompt_embeds"][None]

    def _path(self, step: int, number: int) -> Path:
        return self.output / SAMPLES_FOLDER / f"step-{step:06d}" / f"{number:03d}.mp4"

    def _share(self, jobs: Sequence[Any]) -> Sequence[Any]:
        return jobs[self.accelerator.process_index :: self.accelerator.num_processes]


@contextmanager
def _evaluating(transformer: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; mode and random state are put back."""
    training = transformer.training
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        transformer.eval()
        try:
            yield
        finally:
            transformer.train(training)
