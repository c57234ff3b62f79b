"""What each CogVideoX family is, in miniature: component configs as plain dicts, no torch.

What decides how a model must be treated is real: VAE scale facts and 8x8x4 compression, scheduler, kind of
positions, patch sizes, ofs, text length, latent channels. What decides the cost is small: layers, widths
and the default video, 17 frames of 64x96. The three branches (2B; 5B; 1.5) differ in shape, as real ones do
or nearly do, so that a LoRA of one cannot pass for another's.

Sources: the published configs of THUDM/CogVideoX-2b, CogVideoX-5b, CogVideoX-5b-I2V, CogVideoX1.5-5B and
CogVideoX1.5-5B-I2V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["FAMILIES", "Family", "FamilyFacts", "facts_of"]

Family = Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_LATENT_CHANNELS = 16
_TEXT_DIM = 32
_HEAD_DIM = 16
_TIME_DIM = 64


@dataclass(frozen=True)
class FamilyFacts:
    """What tells the families apart."""

    image_to_video: bool = False
    rope: bool = True
    learned_positions: bool = False
    patch_size_t: int | None = None
    ofs: bool = False
    text_length: int = 226
    scaling_factor: float = 0.7
    invert_scale_latents: bool = False
    snr_shift_scale: float = 1.0
    layers: int = 3
    heads: int = 6

    @property
    def pipeline(self) -> str:
        """Class name of the diffusers pipeline."""
        return "CogVideoXImageToVideoPipeline" if self.image_to_video else "CogVideoXPipeline"

    def transformer(self) -> dict[str, Any]:
        """Arguments of ``CogVideoXTransformer3DModel``."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": _HEAD_DIM,
            "in_channels": _LATENT_CHANNELS * (2 if self.image_to_video else 1),
            "out_channels": _LATENT_CHANNELS,
            "time_embed_dim": _TIME_DIM,
            "ofs_embed_dim": _TIME_DIM if self.ofs else None,
            "text_embed_dim": _TEXT_DIM,
            "num_layers": self.layers,
            "sample_height": 8,
            "sample_width": 12,
            "sample_frames": 17,
            "patch_size": 2,
            "patch_size_t": self.patch_size_t,
            "patch_bias": self.patch_size_t is None,
            "max_text_seq_length": self.text_length,
            "use_rotary_positional_embeddings": self.rope,
            "use_learned_positional_embeddings": self.learned_positions,
        }

    def vae(self) -> dict[str, Any]:
        """Arguments of ``AutoencoderKLCogVideoX``.

        ``sample_height`` and ``sample_width`` give tiles of 48x80, the smallest at which the overlaps of
        diffusers' tiling are whole latent pixels; at most other small sizes it returns a wrong shape.
        """
        return {
            "block_out_channels": (8, 16, 16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": _LATENT_CHANNELS,
            "sample_height": 96,
            "sample_width": 160,
            "scaling_factor": self.scaling_factor,
            "invert_scale_latents": self.invert_scale_latents,
        }

    def scheduler(self) -> dict[str, Any]:
        """Arguments of ``CogVideoXDDIMScheduler``."""
        return {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": self.snr_shift_scale,
        }

    def text_encoder(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of ``T5Config``: the T5 v1.1 layout, small."""
        return {
            "vocab_size": vocab_size,
            "d_model": _TEXT_DIM,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": False,
        }


_FACTS: dict[str, FamilyFacts] = {
    "2b": FamilyFacts(rope=False, scaling_factor=1.15258426, snr_shift_scale=3.0, layers=2, heads=4),
    "5b": FamilyFacts(),
    "5b-i2v": FamilyFacts(image_to_video=True, learned_positions=True),
    "1.5-5b": FamilyFacts(patch_size_t=2, invert_scale_latents=True, text_length=224, heads=5),
    "1.5-5b-i2v": FamilyFacts(
        image_to_video=True, patch_size_t=2, invert_scale_latents=True, text_length=224, heads=5, ofs=True
    ),
}


def facts_of(family: str) -> FamilyFacts:
    """The facts of a family.

    Raises:
        ConfigError: if there is no such family.
    """
    from cogcache.errors import ConfigError

    try:
        return _FACTS[family]
    except KeyError:
        raise ConfigError(
            f"{family!r} is no model family.", f"Choose one of {', '.join(FAMILIES)}."
        ) from None
