"""Building the model: components, random weights, files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcache.quiet import quiet_libraries
from cogcache.tiny.families import Family, FamilyFacts, facts_of
from cogcache.tiny.tokenizer import write_tokenizer
from cogcache.tiny.weights import randomise, tune_vae
from cogcache.whole_folder import whole_folder

if TYPE_CHECKING:
    import torch

__all__ = ["build_tiny_model"]


def build_tiny_model(out: Path, family: Family, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a tiny CogVideoX of ``family`` to the folder ``out`` and return it.

    Args:
        out: New or empty folder. It appears complete or not at all.
        family: ``2b``, ``5b``, ``5b-i2v``, ``1.5-5b`` or ``1.5-5b-i2v``.
        seed: Decides the weights; the same seed gives the same bytes.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of all stored weights.

    Raises:
        ConfigError: if the family or the dtype is unknown.
        StorageError: if ``out`` is there and not empty, or cannot be written.
    """
    from cogcache.models import torch_dtype

    facts, weights_dtype = facts_of(family), torch_dtype(dtype)
    with whole_folder(out) as folder:
        _write(folder, facts, family, seed, weights_dtype)
    return out


def _write(folder: Path, facts: FamilyFacts, family: Family, seed: int, dtype: torch.dtype) -> None:
    import diffusers
    from transformers import AutoTokenizer

    folder.mkdir()
    write_tokenizer(folder / "tokenizer", facts.text_length)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    modules = _modules(facts, len(tokenizer), (seed, family), dtype)
    pipeline = getattr(diffusers, facts.pipeline)(
        tokenizer=tokenizer,
        scheduler=diffusers.CogVideoXDDIMScheduler(**facts.scheduler()),
        **modules,
    )
    with quiet_libraries():
        for name, module in modules.items():
            module.save_pretrained(folder / name)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)  # model_index.json


def _modules(
    facts: FamilyFacts, vocab_size: int, key: tuple[object, ...], dtype: torch.dtype
) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):  # constructors draw weights, which are then replaced
        modules = {
            "vae": AutoencoderKLCogVideoX(**facts.vae()),
            "text_encoder": T5EncoderModel(T5Config(**facts.text_encoder(vocab_size))),
            "transformer": CogVideoXTransformer3DModel(**facts.transformer()),
        }
    for name, module in modules.items():
        randomise(module, *key, name)
    tune_vae(modules["vae"])
    # nn.Module's own: the model classes' override warns about layers that large models keep in float32.
    return {name: torch.nn.Module.to(module.eval(), dtype) for name, module in modules.items()}
