"""Keeping the progress bars of the model libraries off the screen, where ours is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within this, diffusers and transformers draw no progress bars while loading or saving."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    were_on = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_on in zip(libraries, were_on, strict=True):
            if was_on:
                library.enable_progress_bar()
