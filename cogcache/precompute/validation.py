"""Prompts to sample videos from during training, so that training needs no encoder for them.

``--validation-prompts`` lists them, one a line; for image-to-video ``--validation-images`` lists a picture for
each, matched by line number. Their embeddings join the ``text`` series, their noise-free first frames the
``images`` series, and ``validation.jsonl`` points at both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcache.cache.format import (
    IMAGES,
    TEXT,
    VALIDATION_FILE,
    FailureRecord,
    ValidationRecord,
    digest,
)
from cogcache.cache.keys import text_key
from cogcache.cache.tables import current_validation
from cogcache.errors import ConfigError, DatasetError, VideoError
from cogcache.precompute.images import ImageSource, clean_key
from cogcache.precompute.listing import read_lines
from cogcache.precompute.paths import Locator
from cogcache.precompute.settings import EncodeSettings
from cogcache.progress import say

__all__ = ["ValidationPrompts", "plan_validation"]


@dataclass(frozen=True)
class ValidationPrompts:
    """The prompts of a cache after this run.

    Attributes:
        rows: One for each prompt, in order.
        images: Key to picture, of those this run can encode.
        given: Whether this run was given them; else they are kept from an earlier one.
    """

    rows: tuple[ValidationRecord, ...]
    images: Mapping[str, ImageSource]
    given: bool

    @property
    def captions(self) -> dict[str, str]:
        """Text key to prompt."""
        return {row.text: row.prompt for row in self.rows}

    def complete(self, durable: Mapping[str, set[str]]) -> list[ValidationRecord]:
        """Rows whose image is there; embeddings always are."""
        return [row for row in self.rows if row.image is None or row.image in durable[IMAGES]]

    def failures(self, durable: Mapping[str, set[str]], reasons: Mapping[str, str]) -> list[FailureRecord]:
        """One for each row whose image is not there."""
        complete = self.complete(durable)
        lost = "its picture is not known any more; give --validation-prompts and --validation-images again"
        return [
            FailureRecord(
                id=digest(["validation", number, row.prompt])[:16],
                source=row.image_name or "",
                window="validation",
                reason=reasons.get(row.image or "", "not encoded" if row.image in self.images else lost),
            )
            for number, row in enumerate(self.rows)
            if row not in complete
        ]


def plan_validation(settings: EncodeSettings) -> ValidationPrompts:
    """The prompts given, read and checked; without any, those that the cache already has.

    Raises:
        ConfigError: if the flags do not fit each other or the model.
        DatasetError: with every mistake found in the files; unreadable pictures are among them.
    """
    config = settings.config
    if config.validation_prompts is None:
        if config.validation_images is not None:
            raise ConfigError("--validation-images needs --validation-prompts.")
        return _kept(settings)
    wants_images = settings.variant.task == "i2v"
    if wants_images != (config.validation_images is not None):
        raise ConfigError(
            "this is an image-to-video model: validation prompts need --validation-images."
            if wants_images
            else "--validation-images is for image-to-video models; this one takes none."
        )
    prompts, pictures = _read(config.validation_prompts, config.validation_images, settings)
    prints = settings.identity().series
    sources = [ImageSource.of_file(path, name, settings.main.size) for path, name in pictures]
    keys = [clean_key(prints[IMAGES], source) for source in sources]
    rows = tuple(
        ValidationRecord(
            prompt=prompt,
            text=text_key(prints[TEXT], prompt),
            image=keys[number] if keys else None,
            image_name=sources[number].name if sources else None,
        )
        for number, prompt in enumerate(prompts)
    )
    return ValidationPrompts(rows, dict(zip(keys, sources, strict=True)), given=True)


def _kept(settings: EncodeSettings) -> ValidationPrompts:
    rows = tuple(current_validation(settings.shards))
    if not rows and (settings.shards / VALIDATION_FILE).exists():
        say("Note: the validation prompts of this cache are lost; give --validation-prompts again.")
    if settings.config.remake_images and any(row.image for row in rows):
        raise ConfigError(
            "--remake-images also drops the images of the validation prompts of this cache.",
            "Give --validation-prompts and --validation-images again.",
        )
    return ValidationPrompts(rows, {}, given=False)


def _read(
    prompts_file: Path, images_file: Path | None, settings: EncodeSettings
) -> tuple[Sequence[str], list[tuple[Path, str]]]:
    """Prompts, and the path and listed name of each picture."""
    mistakes: list[str] = []
    prompts = read_lines(prompts_file, mistakes) or []
    names = (read_lines(images_file, mistakes) or []) if images_file else []
    if images_file and prompts and names and len(prompts) != len(names):
        mistakes.append(
            f"{prompts_file.name} has {len(prompts)} lines, {images_file.name} {len(names)}: they are matched by line"
        )
    pictures = []
    for number, name in enumerate(names, 1):
        assert images_file
        try:
            if name:
                pictures.append(_picture(name, images_file, settings))
        except (DatasetError, VideoError) as error:
            mistakes.append(f"{images_file.name} line {number}: {error.message}")
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise DatasetError(f"the lists for validation have {count}:", mistakes)
    return prompts, pictures


def _picture(name: str, images_file: Path, settings: EncodeSettings) -> tuple[Path, str]:
    root = images_file.parent.resolve()
    path, listed = Locator(root, settings.config.allow_outside, "folder of the list").find(name)
    try:
        ImageSource.of_file(path, listed, settings.main.size).load(settings)
    except VideoError as error:
        raise DatasetError(f"{name}: {error.message}") from None
    return path, listed
