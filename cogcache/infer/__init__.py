"""Base model + LoRA -> video files, through the stock diffusers pipeline."""

from cogcache.infer.run import infer

__all__ = ["infer"]
