"""Which clips a data root gives, each with an identity and the keys of its cache entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cogcache.cache import keys
from cogcache.cache.format import IMAGES, LATENTS, TEXT, SampleRecord, digest
from cogcache.cores import reading_threads
from cogcache.geometry import Bucket
from cogcache.hashing import content_id
from cogcache.precompute.buckets import place
from cogcache.precompute.datasets import ClipItem
from cogcache.precompute.images import ImageSource, draw_keys
from cogcache.precompute.settings import EncodeSettings
from cogcache.precompute.shapes import look_at
from cogcache.video import ClipRequest, Window

__all__ = ["ClipWork", "plan_clips", "text_key"]


@dataclass(frozen=True)
class ClipWork:
    """One clip to be in the cache: a window of a listed video with its caption.

    ``id`` names the clip in training draws and logs; it depends on the path in the list, the window and how often the
    path was listed before, never on the caption or the content. ``trouble`` says why the clip fits no bucket; it then
    has one all the same, by which it is known.
    """

    id: str
    item: ClipItem
    request: ClipRequest
    sha256: str
    bucket: Bucket
    latents: str
    text: str
    image: ImageSource | None = None
    images: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def window(self) -> str:
        """Readable name of the part of the video."""
        return str(self.request.window)

    def sample(self, settings: EncodeSettings) -> SampleRecord:
        """The clip's row in ``samples.jsonl``."""
        return SampleRecord(
            id=self.id,
            source=self.item.source,
            sha256=self.sha256,
            window=self.window,
            caption=self.item.caption,
            frames=self.bucket.frames,
            height=self.bucket.height,
            width=self.bucket.width,
            fps=settings.fps,
            latents=self.latents,
            text=self.text,
            images=self.images,
        )


def text_key(settings: EncodeSettings, caption: str) -> str:
    """The key of a caption's embedding."""
    return keys.text_key(settings.text_fingerprint(), caption)


def plan_clips(items: Sequence[ClipItem], settings: EncodeSettings) -> list[ClipWork]:
    """All clips of a data root in order: every window of every listed video.

    Reads each file once to hash its content, and where there are several buckets looks at its frames (both are
    remembered between runs).
    """
    with ThreadPoolExecutor(reading_threads(settings.config.workers)) as pool:
        hashes = list(pool.map(content_id, (item.path for item in items)))
    prints = settings.identity().series
    places = _places(items, settings)
    seen: Counter[str] = Counter()
    clips = []
    for item, sha256, (bucket, trouble) in zip(items, hashes, places, strict=True):
        occurrence = seen[item.source]
        seen[item.source] += 1
        for window in _windows(settings):
            request = _request(settings, window, bucket)
            image = _image(item, request, sha256, settings)
            clips.append(
                ClipWork(
                    id=digest([item.source, str(window), occurrence])[:16],
                    item=item,
                    request=request,
                    sha256=sha256,
                    bucket=bucket,
                    latents=keys.latent_key(prints[LATENTS], sha256, str(window), bucket),
                    text=keys.text_key(prints[TEXT], item.caption),
                    image=image,
                    images=tuple(draw_keys(prints[IMAGES], image, settings.config.image_draws))
                    if image
                    else (),
                    trouble=trouble,
                )
            )
    return clips


def _places(items: Sequence[ClipItem], settings: EncodeSettings) -> list[tuple[Bucket, str]]:
    """The bucket of each video, and why it does not fit there; empty where it may."""
    buckets = settings.buckets
    if len(buckets) == 1:
        return [(buckets[0], "")] * len(items)
    found = []
    threads = reading_threads(settings.config.workers)
    for shape in look_at([item.path for item in items], settings.fps, threads):
        bucket = place(shape, buckets, settings.placing) if shape else None
        trouble = ""
        if shape and not bucket:
            count = "a single picture" if shape.still else f"{shape.frames} frames"
            trouble = f"{count} < every bucket: {', '.join(map(str, sorted(buckets)))}"
        found.append((bucket or min(buckets), trouble))  # a file that cannot be read fails when it is read
    return found


def _image(item: ClipItem, request: ClipRequest, sha256: str, settings: EncodeSettings) -> ImageSource | None:
    """The clip's conditioning image, for image-to-video: the one listed, else the clip's first frame."""
    if settings.variant.task != "i2v":
        return None
    if item.image is not None:
        return ImageSource.of_file(settings.config.data_root / item.image, item.image, request.size)
    return ImageSource.of_clip(item.path, request, sha256, item.source)


def _windows(settings: EncodeSettings) -> list[Window]:
    count = settings.config.windows
    if count == 1:
        return [Window(settings.config.window)]
    return [Window("part", index, count) for index in range(count)]


def _request(settings: EncodeSettings, window: Window, bucket: Bucket) -> ClipRequest:
    config = settings.config
    return ClipRequest(
        frames=bucket.frames,
        size=bucket.size,
        fps=settings.fps,
        window=window,
        short=config.short,
        fit=config.fit,
        interpolation=config.interpolation,
        reader=config.reader,
    )
