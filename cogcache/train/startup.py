"""What happens before the first step: how long each part takes, and what is kept for the next run."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogcache.memory import cache_folder

__all__ = ["Startup", "import_libraries", "keep_compilations"]


class Startup:
    """Times the parts of a start. Those of one name are added up.

    Args:
        begun: Seconds that have passed before, counted as ``imports``.
    """

    def __init__(self, begun: float = 0.0) -> None:
        self._parts = {"imports": begun}
        self._started = time.perf_counter() - begun

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is part of ``name``."""
        started = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - started

    def line(self) -> str:
        """``Ready in 9.1 s: imports 4.0, model 4.5, data 0.1, rest 0.5.``"""
        total = time.perf_counter() - self._started
        rest = total - sum(self._parts.values())
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in {**self._parts, "rest": rest}.items())
        return f"Ready in {total:.1f} s: {parts}."


def import_libraries() -> None:
    """Import what training needs in any case, so that it is not counted as something else."""
    if "diffusers.models.transformers.cogvideox_transformer_3d" in sys.modules:
        return
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from diffusers.models.transformers import cogvideox_transformer_3d  # noqa: F401


def keep_compilations() -> None:
    """Let torch keep what it compiles in the user's cache folder, for the next run.

    By default it takes a folder for temporary files, which does not outlive a restart, or on clusters a job. A folder
    that the user has chosen, by ``TORCHINDUCTOR_CACHE_DIR``, stays; so does the default where the cache folder cannot
    be written.
    """
    folder = cache_folder() / "compile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if os.access(folder, os.W_OK) and (chosen is None or _is_torchs_own(Path(chosen))):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _is_torchs_own(folder: Path) -> bool:
    """Whether torch has named its default in the environment itself, which it does while diffusers is imported."""
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")
