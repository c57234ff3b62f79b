"""The LoRA file: diffusers' format, plus where the LoRA comes from.

``pytorch_lora_weights.safetensors`` holds ``transformer.<module>.lora_A.weight`` [rank, in] and
``transformer.<module>.lora_B.weight`` [out, rank]. Its metadata has two texts beside ``format``:

``lora_adapter_metadata``
    The PEFT ``LoraConfig`` as JSON, each key prefixed by ``transformer.``. Stock ``pipe.load_lora_weights``
    builds the adapter from it and so applies the trained alpha / rank; without it, it takes alpha = rank.
``cogcache``
    :class:`Provenance` as JSON: base model and its facts, cache fingerprint, and the training clips' frames,
    size and fps. diffusers ignores it; ``cogcache infer`` takes its defaults from it.

Files of other tools are read too (:mod:`cogcache.lora.foreign`). Files are never unpickled.
"""

from cogcache.lora.header import LORA_FILE_NAME, LoraHeader, Provenance, read_lora_header
from cogcache.lora.writing import save_lora, save_tensors

__all__ = ["LORA_FILE_NAME", "LoraHeader", "Provenance", "read_lora_header", "save_lora", "save_tensors"]
