"""Every setting of every command, declared once.

Each pydantic model is at the same time the command's flags (:mod:`cogcache.flags`), its YAML form (keys
are the flag names with ``_`` for ``-``), its ``--help`` text, and the record saved beside the output.
Unknown keys are refused. ``None`` as a default means "decided by the model or by another setting", as the
description says.
"""

from cogcache.config.base import CommandConfig, setting
from cogcache.config.encode import EncodeConfig, ExtractImagesConfig
from cogcache.config.infer import InferConfig
from cogcache.config.train import TrainConfig

__all__ = ["CommandConfig", "EncodeConfig", "ExtractImagesConfig", "InferConfig", "TrainConfig", "setting"]
