"""Which clips a data root gives, each with an identity and the keys of its cache entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cogcache.cache.format import IMAGES, LATENTS, TEXT, SampleRecord, digest, entry_key
from cogcache.hashing import content_id
from cogcache.precompute.datasets import ClipItem
from cogcache.precompute.images import ImageSource, draw_keys
from cogcache.precompute.settings import EncodeSettings
from cogcache.video import ClipRequest, Window

__all__ = ["ClipWork", "plan_clips", "text_key"]


@dataclass(frozen=True)
class ClipWork:
    """One clip to be in the cache: a window of a listed video with its caption.

    ``id`` names the clip in training draws and logs; it depends on the path in the list, the window and how often the
    path was listed before, never on the caption or the content.
    """

    id: str
    item: ClipItem
    request: ClipRequest
    sha256: str
    latents: str
    text: str
    image: ImageSource | None = None
    images: tuple[str, ...] = ()

    @property
    def window(self) -> str:
        """Readable name of the part of the video."""
        return str(self.request.window)

    def sample(self, settings: EncodeSettings) -> SampleRecord:
        """The clip's row in ``samples.jsonl``."""
        return SampleRecord(
            id=self.id,
            source=self.item.source,
            window=self.window,
            caption=self.item.caption,
            frames=settings.frames,
            height=settings.size.height,
            width=settings.size.width,
            fps=settings.fps,
            latents=self.latents,
            text=self.text,
            images=self.images,
        )


def text_key(settings: EncodeSettings, caption: str) -> str:
    """The key of a caption's embedding."""
    return entry_key(settings.text_fingerprint(), caption=caption)


def plan_clips(items: Sequence[ClipItem], settings: EncodeSettings) -> list[ClipWork]:
    """All clips of a data root in order: every window of every listed video.

    Reads each file once to hash its content (remembered between runs).
    """
    with ThreadPoolExecutor(settings.config.workers) as pool:
        hashes = list(pool.map(content_id, (item.path for item in items)))
    prints = settings.identity().series
    seen: Counter[str] = Counter()
    clips = []
    for item, sha256 in zip(items, hashes, strict=True):
        occurrence = seen[item.source]
        seen[item.source] += 1
        for window in _windows(settings):
            request = _request(settings, window)
            image = _image(item, request, sha256, settings)
            clips.append(
                ClipWork(
                    id=digest([item.source, str(window), occurrence])[:16],
                    item=item,
                    request=request,
                    sha256=sha256,
                    latents=entry_key(prints[LATENTS], source=sha256, window=str(window)),
                    text=entry_key(prints[TEXT], caption=item.caption),
                    image=image,
                    images=tuple(draw_keys(prints[IMAGES], image, settings.config.image_draws))
                    if image
                    else (),
                )
            )
    return clips


def _image(item: ClipItem, request: ClipRequest, sha256: str, settings: EncodeSettings) -> ImageSource | None:
    """The clip's conditioning image, for image-to-video: the one listed, else the clip's first frame."""
    if settings.variant.task != "i2v":
        return None
    if item.image is not None:
        return ImageSource.of_file(settings.config.data_root / item.image, item.image)
    return ImageSource.of_clip(item.path, request, sha256, item.source)


def _windows(settings: EncodeSettings) -> list[Window]:
    count = settings.config.windows
    if count == 1:
        return [Window(settings.config.window)]
    return [Window("part", index, count) for index in range(count)]


def _request(settings: EncodeSettings, window: Window) -> ClipRequest:
    config = settings.config
    return ClipRequest(
        frames=settings.frames,
        size=settings.size,
        fps=settings.fps,
        window=window,
        short=config.short,
        fit=config.fit,
        interpolation=config.interpolation,
        reader=config.reader,
    )
