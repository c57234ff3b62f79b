"""From shards to batches, with nothing random in between.

A run is a list of optimizer steps, each a set of samples of one bucket (:mod:`cogcache.cache.plan`). Every
process takes its share in microbatches; threads read these ahead, in order. All that is random about a
sample (timestep, noise, posterior, dropout) is a function of (seed, epoch, sample id, purpose) alone, so
neither the number of threads, processes or microbatches nor a stop in between changes what is drawn.

Threads, not processes: reading is system calls and checksums, drawing noise is torch, and both let go of the
interpreter lock. Nothing is copied through shared memory and nothing is forked beside a GPU context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cogcache.cache.format import IMAGES, TEXT, SampleRecord
from cogcache.cache.plan import epoch_batches, share, steps_per_epoch
from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.draws import generator, uniform
from cogcache.errors import CacheError
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.variants import Variant

__all__ = ["Batch", "Draws", "Micro", "Samples", "StepPlan", "read_ahead", "read_sample", "step_plans"]

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Micro:
    """What one process runs at once: indices of samples. ``real`` is how many of them count.

    A process without a sample of its own gets a filler (``real`` 0), so that all processes take part in the
    exchange of gradients.
    """

    epoch: int
    samples: tuple[int, ...]
    real: int


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. ``number`` counts from 1; ``micros[p]`` are the microbatches of process ``p``."""

    number: int
    epoch: int
    batch: tuple[int, ...]
    micros: tuple[tuple[Micro, ...], ...]

    def real(self, process: int) -> list[int]:
        """Samples that process ``process`` counts, in the order it runs them."""
        return [index for micro in self.micros[process] for index in micro.samples[: micro.real]]


def step_plans(
    samples: list[SampleRecord], config: TrainConfig, processes: int, done: int = 0
) -> Iterator[StepPlan]:
    """The optimizer steps after the first ``done``, up to ``config.steps``."""
    buckets = [(sample.frames, sample.height, sample.width) for sample in samples]
    global_batch = config.batch_size * config.grad_accum * processes
    per_epoch = steps_per_epoch(buckets, global_batch)
    known, batches = -1, list[tuple[int, ...]]()
    for number in range(done, config.steps):
        epoch, place = divmod(number, per_epoch)
        if epoch != known:
            known, batches = epoch, epoch_batches(buckets, config.seed, epoch, global_batch)
        batch = batches[place]
        micros = tuple(_micros(batch, epoch, config.batch_size, p, processes) for p in range(processes))
        yield StepPlan(number + 1, epoch, batch, micros)


def _micros(batch: tuple[int, ...], epoch: int, size: int, process: int, processes: int) -> tuple[Micro, ...]:
    result = []
    for slots in share(batch, size, process, processes):
        real = tuple(slot for slot in slots if slot is not None)
        result.append(Micro(epoch, real or batch[:1], len(real)))
    return tuple(result)


@dataclass(frozen=True)
class Batch:
    """Tensors of one microbatch; names and shapes as in :mod:`cogcache.train.objective`."""

    moments_bcfhw: Tensor
    prompt_embeds_bld: Tensor
    noise_bpchw: Tensor
    posterior_noise_bcfhw: Tensor
    timesteps_b: Tensor
    image_latents_bcfhw: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with ``function`` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(value) for name, value in values.items() if value is not None})

    def losses(self, transformer: nn.Module, scheduler: Any, variant: Variant, dtype: torch.dtype) -> Tensor:
        """What :func:`~cogcache.train.objective.loss_per_sample` gives for it, float32 [B]."""
        return loss_per_sample(
            transformer,
            scheduler,
            self.moments_bcfhw,
            self.prompt_embeds_bld,
            noise_bpchw=self.noise_bpchw,
            timesteps_b=self.timesteps_b,
            variant=variant,
            posterior_noise_bcfhw=self.posterior_noise_bcfhw,
            image_latents_bcfhw=self.image_latents_bcfhw,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Draws:
    """All that is random about one use of a sample.

    Attributes:
        timestep: In [0, number of training timesteps).
        text: Key of the embedding to use.
        image: Key of the image condition to use; None for text-to-video.
        image_dropped: Whether zeros take its place.
        normal: From purpose and shape to standard normal noise, float32.
    """

    timestep: int
    text: str
    image: str | None
    image_dropped: bool
    normal: Callable[[str, tuple[int, ...]], Tensor]


def read_sample(
    reader: CacheReader, variant: Variant, record: SampleRecord, draws: Draws
) -> dict[str, Tensor]:
    """The tensors of one sample by the names of :class:`Batch`, each without its first dimension."""
    moments = reader.moments(record.latents)
    channels, frames, height, width = variant.latent_channels, *moments.shape[1:]
    padded = padded_frames(frames, variant.patch_size_t)
    row = {
        "moments_bcfhw": moments,
        "prompt_embeds_bld": reader.read(TEXT, draws.text).tensors["prompt_embeds"],
        "noise_bpchw": draws.normal("noise", (padded, channels, height, width)),
        "posterior_noise_bcfhw": draws.normal("posterior", (channels, frames, height, width)),
        "timesteps_b": torch.tensor(draws.timestep),
    }
    if draws.image is not None:
        latents = reader.read(IMAGES, draws.image).tensors["latents"]
        row["image_latents_bcfhw"] = torch.zeros_like(latents) if draws.image_dropped else latents
    return row


class Samples:
    """The training samples of a cache, with their draws. Safe to use from several threads.

    Args:
        records: Which samples of the cache. Default: all.

    Raises:
        CacheError: if the model needs image conditions and a sample has none, or the cache is empty.
    """

    def __init__(
        self,
        reader: CacheReader,
        variant: Variant,
        config: TrainConfig,
        records: Sequence[SampleRecord] | None = None,
    ) -> None:
        self.reader, self.variant, self.config = reader, variant, config
        self.records = reader.samples if records is None else list(records)
        if not self.records:
            raise CacheError(f"{reader.root} holds no clips.", "See its failures.jsonl for the reasons.")
        bare = next((r for r in reader.samples if variant.task == "i2v" and not r.images), None)
        if bare:
            raise CacheError(
                f"{bare.source} has no image conditions, and this is an image-to-video model.",
                "Run 'cogcache encode' with this model.",
            )

    def batch(self, micro: Micro, *, pin: bool = False) -> Batch:
        """Read and draw a microbatch, on the CPU; in page-locked memory with ``pin``."""
        records = [self.records[index] for index in micro.samples]
        rows = [
            read_sample(self.reader, self.variant, record, self._draws(micro.epoch, record))
            for record in records
        ]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch = Batch(**stacked)
        return batch.map(Tensor.pin_memory) if pin else batch

    def timestep(self, epoch: int, record: SampleRecord) -> int:
        """The timestep of a sample in an epoch, uniform over {0 .. number of training timesteps - 1}."""
        return int(self._uniform(epoch, record, "timestep") * self.variant.num_train_timesteps)

    def _draws(self, epoch: int, record: SampleRecord) -> Draws:
        caption_dropped = self._uniform(epoch, record, "caption") < self.config.caption_dropout
        return Draws(
            timestep=self.timestep(epoch, record),
            text=self.reader.manifest.unconditional if caption_dropped else record.text,
            image=self._image(epoch, record) if self.variant.task == "i2v" else None,
            image_dropped=self._uniform(epoch, record, "image dropout") < self.config.image_dropout,
            normal=lambda purpose, shape: self._normal(epoch, record, purpose, shape),
        )

    def _image(self, epoch: int, record: SampleRecord) -> str:
        """Key of one draw of the image-condition bank."""
        return record.images[int(self._uniform(epoch, record, "image") * len(record.images))]

    def _uniform(self, epoch: int, record: SampleRecord, purpose: str) -> float:
        return uniform(self.config.seed, epoch, record.id, purpose)

    def _normal(self, epoch: int, record: SampleRecord, purpose: str, shape: tuple[int, ...]) -> Tensor:
        source = generator(self.config.seed, epoch, record.id, purpose)
        return torch.randn(shape, generator=source, dtype=torch.float32)


def read_ahead(load: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """``map(load, jobs)`` with ``workers`` threads working ahead; order and results do not depend on them.

    At most ``2 * workers`` results wait. An exception of ``load`` is raised in its place; closing the
    iterator ends the threads.
    """
    if workers == 0:
        yield from map(load, jobs)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cogcache-read")
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(load, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
