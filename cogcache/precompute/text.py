"""The frozen T5 encoder: captions in, embeddings out, exactly as the diffusers pipelines make them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.format import SCHEMA, Fingerprint
from cogcache.hashing import file_sha256, weights_sha256
from cogcache.models import loading, torch_dtype
from cogcache.precompute.components import config_digest

__all__ = ["FrozenText", "text_fingerprint"]


def text_fingerprint(root: Path, dtype: str, length: int) -> Fingerprint:
    """What determines the bytes of an embedding: weights, config, tokenizer, precision, token length."""
    return {
        "schema": SCHEMA,
        "text_weights": weights_sha256(root / "text_encoder"),
        "text_config": config_digest(root, "text_encoder"),
        "text_tokenizer": _tokenizer_sha256(root / "tokenizer"),
        "text_dtype": dtype,
        "text_length": length,
    }


def _tokenizer_sha256(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


class FrozenText:
    """Tokenizer and ``T5EncoderModel`` of a checkpoint.

    Padded to ``length`` tokens and run **without** an attention mask, because that is what the
    pipelines do: padding positions carry content and are kept.
    """

    def __init__(self, root: Path, dtype: str, length: int, device: torch.device) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        with loading("text encoder", root):
            self._tokenizer = AutoTokenizer.from_pretrained(
                root / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            model = T5EncoderModel.from_pretrained(
                root / "text_encoder", dtype=torch_dtype(dtype), use_safetensors=True, local_files_only=True
            )
        self._hold(model.eval().requires_grad_(False).to(device), length, device)

    def _hold(self, model: Any, length: int, device: torch.device) -> None:
        self._model, self._length, self._device = model, length, device

    @classmethod
    def around(cls, model: Any, tokenizer: Any, length: int, device: torch.device) -> FrozenText:
        """One made of a ``T5EncoderModel`` that is on ``device`` already."""
        made = cls.__new__(cls)
        made._tokenizer = tokenizer
        made._hold(model, length, device)
        return made

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Embed captions: returns ``[B, length, D]`` on the CPU in the encoder's dtype."""
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        embeddings: torch.Tensor = self._model(tokens.input_ids.to(self._device))[0]
        return embeddings.cpu()

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Captions that do not fit the token length and are cut, as the pipelines cut them."""
        one_more = self._length + 1  # asked without a limit, the tokenizer warns of long captions by itself
        return [
            caption
            for caption in captions
            if len(self._tokenizer(caption, truncation=True, max_length=one_more).input_ids) > self._length
        ]
