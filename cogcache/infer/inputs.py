"""What the user gives for each video: prompt, first frame or source video, and the name of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcache.config import InferConfig
from cogcache.errors import ConfigError

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True)
class Inputs:
    """One entry for each video. ``images`` and ``videos`` are empty where none are given."""

    prompts: tuple[str, ...]
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    outputs: tuple[Path, ...]


def read_inputs(config: InferConfig) -> Inputs:
    """Read the lists and match them up.

    Raises:
        ConfigError: if a list cannot be read, or lists do not match.
    """
    if config.output.suffix.lower() != ".mp4":
        raise ConfigError(f"--output {str(config.output)!r}: the name must end in .mp4.")
    matched = bool(config.image or config.images_file or config.video)
    prompts = (*config.prompt, *_read_lines(config.prompts_file, "--prompts-file", "prompts", matched))
    images = (*config.image, *_read_paths(config.images_file))
    return Inputs(
        prompts,
        _one_each(images, len(prompts), "image"),
        _one_each(tuple(config.video), len(prompts), "video"),
        _outputs(config.output, len(prompts)),
    )


def _outputs(output: Path, count: int) -> tuple[Path, ...]:
    if count == 1:
        return (output,)
    return tuple(output.with_name(f"{output.stem}-{n:03}.mp4") for n in range(count))


def _one_each(files: tuple[Path, ...], prompts: int, what: str) -> tuple[Path, ...]:
    if len(files) == 1:
        files *= prompts
    if files and len(files) != prompts:
        raise ConfigError(
            f"{len(files)} {what}s are given for {prompts} prompts.",
            f"Give one {what} a prompt, or one for all.",
        )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"there is no {what} {str(missing[0])!r}.")
    return files


def _read_paths(path: Path | None) -> tuple[Path, ...]:
    """One file a line, relative to the folder of the list."""
    lines = _read_lines(path, "--images-file", "images", matched=True)
    return tuple(path.parent / Path(line).expanduser() for line in lines) if path else ()


def _read_lines(path: Path | None, flag: str, what: str, matched: bool) -> list[str]:
    """Lines without their blanks. Blank ones are left out, but where another list is matched line by line
    they are refused: leaving them out would shift one list against the other.
    """
    if path is None:
        return []
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {str(path)!r} cannot be read: {error}") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not any(lines):
        raise ConfigError(f"{flag} {str(path)!r} holds no {what}.")
    if matched and "" in lines:
        raise ConfigError(f"{flag} {str(path)!r}: line {lines.index('') + 1} is blank.", "Remove it.")
    return [line for line in lines if line]
