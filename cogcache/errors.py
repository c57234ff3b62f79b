"""What can go wrong, as a tree.

::

    CogcacheError                 exit code 2: the input or the environment must be mended first
    ├── ConfigError               a flag or a YAML key is wrong
    │   └── NothingFitsError      ... or asks for more memory than there is (exit code 6)
    ├── DatasetError              the lists of clips and captions are wrong (all mistakes at once)
    ├── ModelError                a checkpoint is missing, incomplete or of an unsupported kind
    ├── GeometryError             a frame count or picture size the model cannot take
    ├── VideoError                one clip cannot be used; the run goes on without it
    │   └── TooShortError         ... because it holds fewer frames than asked for
    ├── CacheError                the shards cannot be used
    │   ├── DamagedCacheError     bytes on disk are not what was committed
    │   └── MismatchError         made with other settings: lists every field as "was / is"
    ├── StorageError              the disk is full or cannot be written
    ├── LoraError                 a LoRA file that does not fit, or is not one
    ├── CheckpointError           a checkpoint to resume from is missing, damaged or of another run
    ├── NonFiniteError            the loss stopped being a number (exit code 4)
    └── StoppedError              stopped by a signal, state saved (exit code 130 or 143)
    PartialFailureError           exit code 3: the run finished, but some clips failed
    DamageFoundError              exit code 5: verify finished, and the cache is not whole

Only the command line turns these into exit codes; everything below it raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "CacheError",
    "CheckpointError",
    "CogcacheError",
    "ConfigError",
    "DamageFoundError",
    "DamagedCacheError",
    "DatasetError",
    "GeometryError",
    "LoraError",
    "MismatchError",
    "ModelError",
    "NonFiniteError",
    "NothingFitsError",
    "PartialFailureError",
    "StoppedError",
    "StorageError",
    "TooShortError",
    "VideoError",
]


class CogcacheError(Exception):
    """Base of all errors that are told to the user in plain words, without a traceback.

    Args:
        message: What is wrong, in one line where possible.
        hint: What to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(CogcacheError):
    """A flag or a YAML key is unknown or has a wrong value."""


class NothingFitsError(ConfigError):
    """In no way that is planned with does a training fit the memory."""

    exit_code = 6


class DatasetError(CogcacheError):
    """The lists of clips and captions are wrong.

    Args:
        mistakes: Every mistake found, one line each, naming file and line.
    """

    def __init__(self, message: str, mistakes: Sequence[str] = (), hint: str = "") -> None:
        super().__init__("\n  ".join([message, *mistakes]), hint)
        self.mistakes = list(mistakes)


class ModelError(CogcacheError):
    """A checkpoint is missing, incomplete or of an unsupported kind."""


class GeometryError(CogcacheError):
    """A frame count or a picture size that the model cannot take."""


class VideoError(CogcacheError):
    """One clip cannot be used. Recorded with its reason; never stops a run."""


class TooShortError(VideoError):
    """A clip holds fewer frames than asked for."""


class CacheError(CogcacheError):
    """The shards cannot be used."""


class DamagedCacheError(CacheError):
    """Bytes on disk are not those that were committed."""


class MismatchError(CacheError):
    """Two records that must agree do not.

    Args:
        differences: Field name to (was, is).
    """

    def __init__(
        self, message: str, differences: Mapping[str, tuple[object, object]], hint: str = ""
    ) -> None:
        lines = [f"{name}: was {was!r}, is {now!r}" for name, (was, now) in differences.items()]
        super().__init__("\n  ".join([message, *lines]), hint)
        self.differences = dict(differences)


class StorageError(CogcacheError):
    """The disk is full, or a file or folder cannot be written."""


class LoraError(CogcacheError):
    """A LoRA file that does not fit the model, or is not a LoRA file."""


class CheckpointError(CogcacheError):
    """A checkpoint to resume from is missing, damaged, or belongs to another run."""


class NonFiniteError(CogcacheError):
    """The loss or its gradient stopped being a number; raised before the optimizer step."""

    exit_code = 4


class StoppedError(CogcacheError):
    """A signal asked the run to stop; it finished its step and saved its state.

    Args:
        signal_number: 2 for Ctrl-C, 15 for SIGTERM; the exit code is 128 more, as shells report it.
    """

    def __init__(self, message: str, signal_number: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


class PartialFailureError(CogcacheError):
    """The run finished and all that is good is committed, but some clips failed."""

    exit_code = 3


class DamageFoundError(CogcacheError):
    """``verify`` finished, and the cache is not whole: every damage is listed."""

    exit_code = 5
