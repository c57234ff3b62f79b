"""The trained weights that come with the package, and the complete model folders that are made of them.

``weights/`` holds what the models share once: the VAE, the text encoder and the tokenizer. Each kind has a folder of
its own with what is its alone, laid out as in a model folder: a model is the shared folders with its own laid over
them. ``scripts/small_model/ship.py`` writes it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cogcache.errors import ConfigError, ModelError
from cogcache.small.architecture import KINDS, Kind
from cogcache.whole_folder import whole_folder

__all__ = ["MODEL_CARD", "SHARED", "WEIGHTS", "small_model"]

WEIGHTS = Path(__file__).parent / "weights"
SHARED = ("vae", "text_encoder", "tokenizer")
"""Components that are stored once. A file of them that differs between kinds lies with each kind."""

MODEL_CARD = "MODEL_CARD.md"


def small_model(kind: Kind, out: Path, *, weights: Path = WEIGHTS) -> Path:
    """Write a small CogVideoX with trained weights to the folder ``out``, in diffusers layout, and return it.

    Files are copied: a link would let a change of the copy change the package.

    Args:
        kind: ``t2v`` or ``i2v`` of CogVideoX 1.0, or ``t2v-1.5``.
        out: New or empty folder. It appears complete or not at all.
        weights: What ``ship.py`` wrote.

    Raises:
        ConfigError: if there is no such kind.
        ModelError: if ``weights`` does not hold it.
        StorageError: if ``out`` is there and not empty, or cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no kind of the small model.", f"Choose one of {', '.join(KINDS)}.")
    parts = [*((weights / name, name) for name in SHARED), (weights / kind, ".")]
    missing = [folder.name for folder, _ in parts if not folder.is_dir()]
    if missing:
        raise ModelError(
            f"{weights} has no {', '.join(missing)}: this installation came without the small model's weights.",
            "Install a version of cogcache that has them, or make them by scripts/small_model/make.py and ship.py.",
        )
    with whole_folder(out) as folder:
        for source, name in parts:
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        shutil.copy(weights / MODEL_CARD, folder / "README.md")
    return out
