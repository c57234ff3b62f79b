"""Where the numbers of a run go: always ``metrics.jsonl``, on request TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

from cogcache.cache.files import storage_errors, write_atomic
from cogcache.config import TrainConfig
from cogcache.errors import ConfigError

__all__ = [
    "METRICS_FILE",
    "WANDB_RUN_FILE",
    "MetricsFile",
    "SampledVideo",
    "TensorBoard",
    "Tracker",
    "ValidationResult",
    "WeightsAndBiases",
    "check_trackers",
    "open_trackers",
    "validated",
]

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_FILE = "wandb-run.txt"


@dataclass(frozen=True)
class SampledVideo:
    """A video that was sampled for validation."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class ValidationResult:
    """What one validation gave.

    Attributes:
        losses: Timestep -> loss of each held-out clip; empty lists where none is held out.
        videos: One for each prompt.
        stop: A signal's number if it ended the validation early, else 0.
        seconds: How long it took.
    """

    losses: Mapping[int, Sequence[float]]
    videos: Sequence[SampledVideo]
    stop: int
    seconds: float

    @property
    def clips(self) -> int:
        """How many clips are held out."""
        return max(map(len, self.losses.values()), default=0)

    def numbers(self) -> dict[str, float | None]:
        """``loss`` over all, and ``loss_t<timestep>`` for each; None for what is not a number. Empty without clips."""
        if not self.clips:
            return {}
        means = {f"loss_t{t}": _mean(losses) for t, losses in self.losses.items()}
        return {"loss": _mean([loss for losses in self.losses.values() for loss in losses]), **means}


def _mean(values: Sequence[float]) -> float | None:
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
    return mean if math.isfinite(mean) else None


class Tracker(Protocol):
    """Takes the numbers of optimizer steps, in order."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` of ``step`` (counted from 1). Nested values may be left out."""
        ...

    def validation(self, step: int, result: ValidationResult) -> None:
        """Record a validation of the state after ``step``, 0 for that before the first."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class MetricsFile:
    """One JSON object a line. On resume it is cut back, so that no step appears twice."""

    def __init__(self, folder: Path, done: int) -> None:
        path = folder / METRICS_FILE
        kept = [line for line in _lines(path) if _step(line) <= done]
        write_atomic(path, b"".join(kept))
        self.path = path
        with storage_errors(path):
            self._stream: TextIO = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """See :class:`Tracker`. On disk (short of a power cut) on return."""
        with storage_errors(self.path):
            self._stream.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._stream.flush()

    def validation(self, step: int, result: ValidationResult) -> None:
        """See :class:`Tracker`. A line of its own: what it says is under ``validation``."""
        videos = [
            {"file": video.path.relative_to(self.path.parent).as_posix(), "prompt": video.prompt}
            for video in result.videos
        ]
        values = {**result.numbers(), "clips": result.clips, "videos": videos}
        self.log(step, {"validation": values, "seconds": result.seconds})

    def close(self) -> None:
        """See :class:`Tracker`."""
        with storage_errors(self.path):
            self._stream.close()


def validated(folder: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` in ``folder`` tells of a validation at ``step``."""
    return any(
        _step(line) == step and "validation" in json.loads(line) for line in _lines(folder / METRICS_FILE)
    )


def _lines(path: Path) -> Sequence[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that a crash cut short."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Scalars as TensorBoard event files in ``folder/tensorboard``."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        for name, value in _numbers(values).items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, result: ValidationResult) -> None:
        """See :class:`Tracker`. Videos become animated GIFs under ``samples/``, prompts texts under ``prompts/``."""
        for name, value in _numbers(result.numbers()).items():
            self._writer.add_scalar(f"validation/{name}", value, step)
        if not result.videos:
            return
        from cogcache.mp4 import read_mp4
        from cogcache.train.gif import gif_summary

        for video in result.videos:
            summary = gif_summary(f"samples/{video.path.stem}", *read_mp4(video.path))
            self._writer.file_writer.add_summary(summary, step)
            self._writer.add_text(f"prompts/{video.path.stem}", video.prompt, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """Scalars and videos to a Weights & Biases run; its environment variables choose project and mode.

    The run's id is kept in ``folder``, and a resumed training goes on with that run. W&B takes no step twice: of steps
    that a kill made a training repeat it keeps the first values, which are the same.

    Raises:
        ConfigError: if the run cannot be opened, for example without an API key.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        known = folder / WANDB_RUN_FILE
        with storage_errors(known):
            run_id = known.read_text("utf-8").strip() if config.resume and known.exists() else None
        try:
            self._run = wandb.init(
                dir=str(folder),
                name=folder.name,
                config=config.model_dump(mode="json"),
                id=run_id,
                resume="allow",
                allow_val_change=True,
            )
        except Exception as error:  # wandb's own kinds differ between its versions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"--report-to wandb: {reason}", "Run wandb login, or set WANDB_MODE=offline."
            ) from error
        write_atomic(known, f"{self._run.id}\n".encode())

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        self._run.log({f"train/{name}": value for name, value in _numbers(values).items()}, step=step)

    def validation(self, step: int, result: ValidationResult) -> None:
        """See :class:`Tracker`."""
        import wandb

        numbers = {f"validation/{name}": value for name, value in _numbers(result.numbers()).items()}
        videos = {
            f"samples/{video.path.stem}": wandb.Video(str(video.path), caption=video.prompt, format="mp4")
            for video in result.videos
        }
        self._run.log({**numbers, **videos}, step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that cannot be opened, before anything is loaded.

    Raises:
        ConfigError: naming the package that is not installed.
    """
    for package in config.report_to:
        if find_spec(package) is None:
            raise ConfigError(
                f"--report-to {package} needs a package that is not installed.",
                f"Run: pip install {package}",
            )


def open_trackers(config: TrainConfig, folder: Path, done: int) -> list[Tracker]:
    """``metrics.jsonl`` and the trackers asked for.

    Args:
        done: Optimizer steps already behind; what was logged beyond them is cut off.

    Returns:
        Trackers that the caller closes.
    """
    with ExitStack() as undo:
        trackers: list[Tracker] = [undo.enter_context(closing(MetricsFile(folder, done)))]
        if "tensorboard" in config.report_to:
            trackers.append(undo.enter_context(closing(TensorBoard(folder, done))))
        if "wandb" in config.report_to:
            trackers.append(WeightsAndBiases(folder, config))
        undo.pop_all()
    return trackers


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
