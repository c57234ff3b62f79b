"""The frozen T5 encoder: captions in, embeddings out, exactly as the diffusers pipelines make them.

Captions are not sorted by length: all are padded to the same number of tokens, so a batch of short ones costs as much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.format import SCHEMA, Fingerprint
from cogcache.errors import ModelError
from cogcache.hashing import file_sha256, weights_sha256
from cogcache.models import loading, torch_dtype
from cogcache.precompute.components import config_digest
from cogcache.precompute.lane import Lane, Running
from cogcache.precompute.text_blocks import stream_blocks

__all__ = ["FrozenText", "choose_batch_size", "choose_offload", "text_fingerprint"]

_BYTES_PER_TOKEN = 300_000
"""Of T5-XXL at work in 16 bits, per token of a batch: feed-forwards 10240 wide, scores of 64 heads by 226 tokens."""


def choose_batch_size(wanted: int | None, device: torch.device) -> int:
    """``--text-batch-size``: as wanted, else 32 on a GPU and 8 on a CPU."""
    return wanted or (32 if device.type == "cuda" else 8)


def choose_offload(wanted: str, weights_bytes: int, tokens: int, device: torch.device) -> bool:
    """Decide ``--text-offload``: ``auto`` streams weights only where they do not fit the free GPU memory.

    Args:
        weights_bytes: Of the encoder, in the dtype in which it runs.
        tokens: In a batch.
    """
    if wanted != "auto" or device.type != "cuda":
        return wanted == "on"
    free, _ = torch.cuda.mem_get_info(device)
    return weights_bytes + tokens * _BYTES_PER_TOKEN > free


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

    def __init__(
        self, root: Path, dtype: str, length: int, device: torch.device, *, offloaded: bool = False
    ) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        with loading("text encoder", root):
            self._tokenizer = AutoTokenizer.from_pretrained(
                root / "tokenizer", local_files_only=True, trust_remote_code=False
            )
            model = T5EncoderModel.from_pretrained(
                root / "text_encoder", dtype=torch_dtype(dtype), use_safetensors=True, local_files_only=True
            )
        self._hold(model.eval().requires_grad_(False), length, device, offloaded=offloaded)

    def _hold(self, model: Any, length: int, device: torch.device, *, offloaded: bool) -> None:
        if offloaded:
            stream_blocks(model, device)
        else:
            model.to(device)
        self._model, self._length, self._lane = model, length, Lane(device)

    @classmethod
    def around(
        cls, model: Any, tokenizer: Any, length: int, device: torch.device, *, offloaded: bool = False
    ) -> FrozenText:
        """One made of a frozen ``T5EncoderModel``, which it puts where it must be."""
        made = cls.__new__(cls)
        made._tokenizer = tokenizer
        made._hold(model, length, device, offloaded=offloaded)
        return made

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """:meth:`start`, and its result."""
        return self.start(captions).result()

    @torch.inference_mode()
    def start(self, captions: Sequence[str]) -> Running:
        """Begin to embed captions: gives ``[B, length, D]`` on the CPU in the encoder's dtype.

        Raises:
            ModelError: if the GPU's memory is too small.
        """
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        try:
            ids = self._lane.upload(tokens.input_ids)
            begun = self._lane.mark()
            return self._lane.download(self._model(ids)[0], begun)
        except torch.OutOfMemoryError:
            raise ModelError(
                "the GPU's memory is too small for the text encoder.",
                "Use --text-offload on, or a smaller --text-batch-size.",
            ) from None

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Captions that do not fit the token length and are cut, as the pipelines cut them."""
        one_more = self._length + 1  # asked without a limit, the tokenizer warns of long captions by itself
        ids = self._tokenizer(list(captions), truncation=True, max_length=one_more).input_ids
        return [caption for caption, own in zip(captions, ids, strict=True) if len(own) > self._length]
