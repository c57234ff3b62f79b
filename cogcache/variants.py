"""What a checkpoint *is*, read from its own config files.

Nothing in this project compares a model's name. Every difference between CogVideoX-2B, 5B, 5B-I2V, 1.5-5B and
1.5-5B-I2V is a value here, taken from ``transformer/config.json``, ``vae/config.json`` and
``scheduler/scheduler_config.json`` of a checkpoint in diffusers layout. Only JSON and safetensors
headers are read: no weights, no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from cogcache.errors import GeometryError, ModelError
from cogcache.geometry import Size, check_frames, check_size, latent_frames

__all__ = [
    "Positions",
    "Task",
    "Variant",
    "expected_dtype",
    "read_config",
    "read_variant",
    "variant_of",
    "weights_dtype",
]

Positions = Literal["sincos", "rope", "rope+learned"]
Task = Literal["t2v", "i2v"]


class Variant(BaseModel):
    """Facts of one checkpoint. Frozen; saved in the manifest and in the LoRA file.

    Sizes of the default video are in pixels and frames; ``*_factor`` are the VAE's compression factors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # transformer
    in_channels: PositiveInt
    latent_channels: PositiveInt
    num_layers: NonNegativeInt
    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt
    patch_size: PositiveInt
    patch_size_t: PositiveInt | None
    positions: Positions
    ofs: bool
    sample_frames: PositiveInt
    sample_height: PositiveInt
    sample_width: PositiveInt
    text_length: PositiveInt
    text_dim: PositiveInt
    # VAE
    spatial_factor: PositiveInt
    temporal_factor: PositiveInt
    scaling_factor: float
    invert_scale_latents: bool
    # scheduler
    snr_shift_scale: float
    num_train_timesteps: PositiveInt

    @property
    def task(self) -> Task:
        """``i2v`` where the transformer takes an image latent beside the noisy one."""
        return "i2v" if self.in_channels == 2 * self.latent_channels else "t2v"

    @property
    def native_fps(self) -> int:
        """Frames per second the family was trained at: 8 for 1.0, 16 for 1.5 (CogVideoX model cards)."""
        return 8 if self.patch_size_t is None else 16

    @property
    def trained_in_float16(self) -> bool:
        """Whether its activations stay in float16's range: true of 2B, the one family without rotary positions.

        All others were trained in bfloat16 (CogVideoX model cards).
        """
        return self.positions == "sincos"

    @property
    def native_dtype(self) -> str:
        """What the published weights are stored in."""
        return "float16" if self.trained_in_float16 else "bfloat16"

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.spatial_factor * self.patch_size

    @property
    def sample_size(self) -> Size:
        """The transformer's own sample size, in pixels."""
        return Size(self.sample_height * self.spatial_factor, self.sample_width * self.spatial_factor)

    @property
    def default_size(self) -> Size:
        """The picture size to use unless another is asked for, in pixels.

        The sample size of 1.5 models is only the extent of their position table (2400x2400 for 1.5-5B), so there
        the size of the model card, 768x1360, is taken where it fits.
        """
        card = Size(768, 1360)
        fits = card.height <= self.sample_size.height and card.width <= self.sample_size.width
        return card if self.patch_size_t is not None and fits else self.sample_size

    @property
    def fixed_grid(self) -> bool:
        """Whether learned positions tie the model to its default size and frame count."""
        return self.positions == "rope+learned"

    def check_clip(self, frames: int, size: Size) -> None:
        """Refuse a frame count or size that this checkpoint cannot take.

        Raises:
            GeometryError: naming the nearest right ones, or the only one allowed.
        """
        check_frames(frames)
        check_size(size, self.size_multiple)
        if self.fixed_grid:
            self._check_fixed_grid(frames, size)
        largest = self.sample_size
        if self.patch_size_t is not None and (size.height > largest.height or size.width > largest.width):
            raise GeometryError(
                f"{size} is larger than this model's position table.", f"The largest size is {largest}."
            )

    def _check_fixed_grid(self, frames: int, size: Size) -> None:
        if size != self.sample_size:
            raise GeometryError(
                f"this model has learned positions of one size, so {size} cannot be used.",
                f"The only size allowed is {self.sample_size}.",
            )
        if frames != self.sample_frames:
            # diffusers would silently swap the learned positions for computed ones.
            raise GeometryError(
                f"this model has learned positions for one frame count, so {frames} frames cannot be used.",
                f"The only count allowed is {self.sample_frames}.",
            )

    def latent_shape(self, frames: int, size: Size) -> tuple[int, int, int, int]:
        """Shape [C, F, H, W] of the latent of a clip."""
        return (
            self.latent_channels,
            latent_frames(frames, self.temporal_factor),
            size.height // self.spatial_factor,
            size.width // self.spatial_factor,
        )

    def video_tokens(self, frames: int, size: Size) -> int:
        """How many tokens of a clip the transformer sees, those of padding frames included, those of text not."""
        _, latents, height, width = self.latent_shape(frames, size)
        time = self.patch_size_t or 1
        return -(-latents // time) * (height // self.patch_size) * (width // self.patch_size)


def read_config(root: Path, name: str) -> dict[str, Any]:
    """Read one JSON config, ``name`` relative to the checkpoint folder ``root``.

    Raises:
        ModelError: if it is missing or not a JSON object.
    """
    path = root / name
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{root} has no {name}.", "A CogVideoX checkpoint in diffusers layout is needed."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return config


def read_variant(root: Path, transformer_root: Path | None = None) -> Variant:
    """Read the facts of the checkpoint in the local folder ``root``.

    Args:
        transformer_root: Take the facts of the transformer from this folder's ``transformer`` instead.

    Raises:
        ModelError: if a config is missing, damaged, or not of a CogVideoX model.
    """
    transformer = read_config(transformer_root or root, "transformer/config.json")
    vae = read_config(root, "vae/config.json")
    scheduler = read_config(root, "scheduler/scheduler_config.json")
    _check_classes(root, transformer, vae, scheduler)
    try:
        return variant_of(transformer, vae, scheduler)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{root} has an incomplete CogVideoX config: {error}") from None


def variant_of(transformer: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> Variant:
    """The facts in the configs of a checkpoint's components.

    Raises:
        ArithmeticError, KeyError, TypeError, ValueError: if a fact is missing or none.
    """
    return Variant(**_transformer_facts(transformer), **_vae_facts(vae), **_scheduler_facts(scheduler))


def _check_classes(root: Path, *configs: dict[str, Any]) -> None:
    wanted = ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", "CogVideoX")
    for config, prefix in zip(configs, wanted, strict=True):
        found = str(config.get("_class_name", ""))
        if not found.startswith(prefix):
            raise ModelError(f"{root} is not a CogVideoX checkpoint: {prefix}... expected, {found!r} found.")
    prediction = configs[-1].get("prediction_type")
    if prediction != "v_prediction":
        raise ModelError(f"{root} has prediction_type {prediction!r}; CogVideoX models predict v.")


def _transformer_facts(config: dict[str, Any]) -> dict[str, Any]:
    rope = bool(config.get("use_rotary_positional_embeddings", False))
    learned = bool(config.get("use_learned_positional_embeddings", False))
    return {
        "in_channels": config["in_channels"],
        "latent_channels": config.get("out_channels") or config["in_channels"],
        "num_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "patch_size": config["patch_size"],
        "patch_size_t": config.get("patch_size_t"),
        "positions": ("rope+learned" if learned else "rope") if rope else "sincos",
        "ofs": bool(config.get("ofs_embed_dim")),
        "sample_frames": config["sample_frames"],
        "sample_height": config["sample_height"],
        "sample_width": config["sample_width"],
        "text_length": config["max_text_seq_length"],
        "text_dim": config["text_embed_dim"],
    }


def _vae_facts(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "spatial_factor": 2 ** (len(config["block_out_channels"]) - 1),
        "temporal_factor": int(config.get("temporal_compression_ratio", 4)),
        "scaling_factor": config["scaling_factor"],
        "invert_scale_latents": bool(config.get("invert_scale_latents", False)),
    }


def _scheduler_facts(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "snr_shift_scale": float(config.get("snr_shift_scale", 3.0)),
        "num_train_timesteps": int(config.get("num_train_timesteps", 1000)),
    }


def expected_dtype(folder: Path, variant: Variant) -> str:
    """That of a component's weights; where they have not been fetched, that of the published ones.

    Raises:
        ModelError: if they are there and cannot be read.
    """
    return weights_dtype(folder) if any(folder.glob("*.safetensors")) else variant.native_dtype


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def weights_dtype(folder: Path) -> str:
    """The floating dtype that a component's safetensors files store: ``"bfloat16"`` and so on.

    Reads only the header of the first file.

    Raises:
        ModelError: if there is no readable safetensors file, or it holds no floating tensor.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors weights.", "Pickled weights (.bin, .pt) are never loaded."
        )
    try:
        with files[0].open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > files[0].stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(size))
        found = {_DTYPES.get(v["dtype"]) for k, v in header.items() if k != "__metadata__"} - {None}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{files[0]} is not a safetensors file: {error}") from None
    if not found:
        raise ModelError(f"{files[0]} holds no floating tensors.")
    # A few tensors kept in a wider dtype do not make it the model's.
    return next(name for name in ("bfloat16", "float16", "float32", "float64") if name in found)
