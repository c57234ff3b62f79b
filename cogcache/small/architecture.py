"""What the small model is: component configs as plain dicts, no torch. Facts of the families as in ``cogcache.tiny``.

Three transformers share one VAE and one text encoder, so these have what all three need: the 1.0 families' scale
facts and the longer text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cogcache.tiny.families import Family, FamilyFacts, facts_of

__all__ = ["FRAMES", "HEIGHT", "KINDS", "WIDTH", "Kind", "SmallFacts", "small_facts"]

Kind = Literal["t2v", "i2v", "t2v-1.5"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FRAMES, HEIGHT, WIDTH = 17, 96, 144

_FAMILIES: dict[Kind, Family] = {"t2v": "5b", "i2v": "5b-i2v", "t2v-1.5": "1.5-5b"}


@dataclass(frozen=True)
class SmallFacts(FamilyFacts):
    """A family's facts, in a size that can be trained in minutes and still shows what it was asked for."""

    layers: int = 8
    heads: int = 9

    def transformer(self) -> dict[str, Any]:
        """Arguments of ``CogVideoXTransformer3DModel``."""
        size = {"sample_height": HEIGHT // 8, "sample_width": WIDTH // 8, "sample_frames": FRAMES}
        return super().transformer() | size | {"text_embed_dim": 128}

    def vae(self) -> dict[str, Any]:
        """Arguments of ``AutoencoderKLCogVideoX``."""
        wide = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
        return super().vae() | wide

    def text_encoder(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of ``T5Config``."""
        return super().text_encoder(vocab_size) | {"d_model": 128, "d_kv": 32, "d_ff": 256}


def small_facts(kind: Kind) -> SmallFacts:
    """The facts of one of the three."""
    family = asdict(facts_of(_FAMILIES[kind]))
    return SmallFacts(**{**family, "layers": 8, "heads": 9})
