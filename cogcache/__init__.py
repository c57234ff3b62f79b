"""LoRA fine-tuning of CogVideoX video models with an offline cache: encode once, train lean, infer stock."""

__version__ = "0.1.0"
