"""The folder that full fine-tuning writes: a transformer in diffusers layout, and where it comes from.

::

    transformer/config.json, *.safetensors   loads with CogVideoXTransformer3DModel.from_pretrained(folder,
                                             subfolder="transformer")
    cogcache.json                            {"training_type": "full", ...Provenance}

A run's output folder and each of its checkpoints are such folders. Only JSON is read here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cogcache.errors import ModelError
from cogcache.lora import Provenance

__all__ = ["RECORD_FILE", "TRANSFORMER_FOLDER", "Finetuned", "read_finetuned"]

TRANSFORMER_FOLDER = "transformer"
RECORD_FILE = "cogcache.json"


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned transformer on disk. ``root`` holds the folder ``transformer``.

    ``provenance`` is all ``None`` for folders not made by this project.
    """

    root: Path
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def transformer(self) -> Path:
        """The folder with the weights and their ``config.json``."""
        return self.root / TRANSFORMER_FOLDER


def read_finetuned(root: Path) -> Finetuned:
    """Find a fine-tuned transformer in ``root`` and read what it says about itself.

    Raises:
        ModelError: if there is none, or its record is damaged.
    """
    if not (root / TRANSFORMER_FOLDER / "config.json").is_file():
        raise ModelError(
            f"{root} holds no fine-tuned transformer.",
            "Give the output folder of 'cogcache train --training-type full'.",
        )
    try:
        text = (root / RECORD_FILE).read_text("utf-8")
    except FileNotFoundError:
        return Finetuned(root)
    except (OSError, ValueError) as error:
        raise ModelError(f"{root / RECORD_FILE} cannot be read: {error}.") from None
    try:
        return Finetuned(root, Provenance.model_validate_json(text))
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(part) for part in reason["loc"])
        raise ModelError(f"{root / RECORD_FILE} is damaged: {where} {reason['msg']}.") from None
