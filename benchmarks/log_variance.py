"""What 8-bit log-variances change in the loss and the LoRA's gradient beside what posterior sampling does; and bytes.

Timestep and noise of a clip stay the same while the posterior's noise is drawn again and again. The spread of the loss
over these draws is what training sees anyway. With the same draws the loss is taken from 8-bit log-variances, too: what
is measured is the root mean square of the difference, as a share of that spread.

    python benchmarks/log_variance.py 5b /tmp/log-variance

Weights are random and tiny, so the log-variances are not those of a trained VAE: the rows after the first put others,
ever narrower, in their place.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

CLIPS = Path(__file__).parent.parent / "cogcache" / "demo" / "bunny"
MEANS = (None, -2.0, -6.0, -10.0, -14.0)
TIMESTEPS = (0, 250, 500, 750, 999, 100, 400, 900)


class Change(NamedTuple):
    """Shares of the spread over posterior draws: ``loss`` of each sample [B], ``gradient`` of the whole batch.

    ``spread`` [B] is that spread of the loss, as a share of the loss.
    """

    loss: Any
    gradient: float
    spread: Any


def change_by_8_bits(
    transformer: Any, scheduler: Any, moments_bcfhw: Any, draws: int, **inputs: Any
) -> Change:
    """How much the loss of each sample and the gradient of their mean differ with 8-bit log-variances.

    Args:
        transformer: With some parameters that are trained.
        moments_bcfhw: In full, bfloat16 or float16.
        draws: How often the posterior's noise is drawn.
        inputs: What else ``loss_per_sample`` needs.
    """
    import torch

    from cogcache.cache.moments import pack_moments, unpack_moments
    from cogcache.train.objective import loss_per_sample

    dtype = str(moments_bcfhw.dtype).removeprefix("torch.")
    packed = torch.stack([unpack_moments(pack_moments(moments), dtype) for moments in moments_bcfhw])
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    shape = moments_bcfhw.chunk(2, dim=1)[0].shape
    losses, gradients = [], []
    for draw in range(draws):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw))
        for moments in (moments_bcfhw, packed):
            loss = loss_per_sample(transformer, scheduler, moments, posterior_noise_bcfhw=noise, **inputs)
            found = torch.autograd.grad(loss.mean(), trained)
            losses.append(loss.detach().double())
            gradients.append(torch.cat([gradient.flatten() for gradient in found]).double())
    full, eight = (torch.stack(losses[n::2]) for n in (0, 1))
    full_gradient, eight_gradient = (torch.stack(gradients[n::2]) for n in (0, 1))
    spread = full.std(0)
    loss = (eight - full).square().mean(0).sqrt() / spread
    noise_of_gradient = full_gradient.var(0).sum().sqrt()
    gradient = (eight_gradient - full_gradient).square().sum(1).mean().sqrt() / noise_of_gradient
    return Change(loss, float(gradient), spread / full.mean(0))


def loaded(model: Path) -> tuple[Any, Any, Any]:
    """Transformer with a LoRA whose both halves are not zero, scheduler, facts."""
    import torch

    from cogcache.config import TrainConfig
    from cogcache.train.model import add_lora, load_scheduler, load_transformer, trainable
    from cogcache.variants import read_variant

    transformer = load_transformer(model, torch.float32)
    add_lora(transformer, TrainConfig(shards=Path("none"), rank=4, alpha=4.0))
    source = torch.Generator().manual_seed(1)
    for name, parameter in trainable(transformer).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.02
    return transformer, load_scheduler(model), read_variant(model)


def encode(model: Path, root: Path, frames: int, size: str) -> Any:
    """A cache of the demo clips."""
    from cogcache.cache.reader import CacheReader
    from cogcache.config import EncodeConfig
    from cogcache.precompute import encode_all

    given = {
        "data_root": CLIPS,
        "model": str(model),
        "vae_dtype": "bfloat16",
        "device": "cpu",
        "fps": "source",
    }
    encode_all(EncodeConfig(**given, shards=root, frames=frames, size=size, image_draws=1))
    return CacheReader(root)


def sizes(moments_bcfhw: Any) -> str:
    """Bytes of a clip's tensors in both forms, in tar shards and in zarr shards with compression."""
    from cogcache.cache.moments import MOMENTS, MOMENTS_8BIT, pack_moments
    from cogcache.cache.tensors import dump_tensors
    from cogcache.cache.zarr.chunk import encode as chunk

    forms = {MOMENTS: moments_bcfhw, MOMENTS_8BIT: [pack_moments(moments) for moments in moments_bcfhw]}
    said = []
    for name, size in (
        ("tar", lambda name, value: len(dump_tensors({name: value}))),
        ("zarr with zstd", lambda _, value: len(chunk(value, "zstd"))),
    ):
        full, eight = (sum(size(form, clip) for clip in forms[form]) / len(moments_bcfhw) for form in forms)
        said.append(f"{name} {full:.0f} -> {eight:.0f} ({1 - eight / full:.1%} less)")
    return ", ".join(said)


def inputs_of(reader: Any, variant: Any) -> tuple[Any, dict[str, Any]]:
    """Moments of the clips of a cache, stacked, and the other arguments of ``loss_per_sample``."""
    import torch

    from cogcache.train.objective import padded_frames

    rows = reader.samples
    moments = torch.stack([reader.moments(row.latents) for row in rows])
    b, _, f, h, w = moments.shape
    noise = (b, padded_frames(f, variant.patch_size_t), variant.latent_channels, h, w)
    inputs = {
        "prompt_embeds_bld": torch.stack(
            [reader.read("text", row.text).tensors["prompt_embeds"] for row in rows]
        ),
        "noise_bpchw": torch.randn(noise, generator=torch.Generator().manual_seed(99)),
        "timesteps_b": torch.tensor(TIMESTEPS[:b]),
        "variant": variant,
    }
    if variant.task == "i2v":
        images = [reader.read("images", row.images[0]).tensors["latents"] for row in rows]
        inputs["image_latents_bcfhw"] = torch.stack(images)
    return moments, inputs


def with_log_variance(moments_bcfhw: Any, mean: float | None) -> Any:
    """The same means with normal log-variances of this mean and standard deviation 2; None changes nothing."""
    import torch

    if mean is None:
        return moments_bcfhw
    means, logvar = moments_bcfhw.chunk(2, dim=1)
    other = torch.randn(logvar.shape, generator=torch.Generator().manual_seed(5)) * 2 + mean
    return torch.cat([means, other.to(means.dtype)], dim=1)


def main(
    family: Annotated[str, typer.Argument(help="2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v.")],
    work: Annotated[Path, typer.Argument(help="New folder for model and shards.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH.")] = "128x192",
    frames: Annotated[int, typer.Option(help="Frames a clip.")] = 17,
    draws: Annotated[int, typer.Option(help="Posterior draws.")] = 32,
) -> None:
    """Encode the eight demo clips and print what 8 bits change, a paragraph for each kind of log-variances."""
    import torch

    from cogcache.tiny import build_tiny_model

    model: Path = build_tiny_model(work / "model", family)
    typer.echo(f"torch {torch.__version__}, Python {platform.python_version()}, {family}, {frames}x{size}")
    reader = encode(model, work / "shards", frames, size)
    transformer, scheduler, variant = loaded(model)
    moments, inputs = inputs_of(reader, variant)
    for mean in MEANS:
        chosen = with_log_variance(moments, mean)
        logvar = chosen.chunk(2, dim=1)[1].float()
        change = change_by_8_bits(transformer, scheduler, chosen, draws, **inputs)
        whose = "of the VAE" if mean is None else "put there"
        typer.echo(
            f"log-variance {logvar.mean():.2f} +- {logvar.std():.2f} ({whose})\n"
            f"  loss: changes by {change.loss.mean():.2%} of its posterior spread, {change.loss.max():.2%} "
            f"for one clip; that spread is {change.spread.mean():.1e} of the loss\n"
            f"  gradient: changes by {change.gradient:.2%} of its posterior spread\n"
            f"  bytes a clip: {sizes(chosen)}"
        )


if __name__ == "__main__":
    typer.run(main)
