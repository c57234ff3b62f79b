"""What must hold between the trainer and the stock pipelines, each as a function that raises AssertionError."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from stock_pipelines import BATCH, CPU, TIMESTEPS, Stock, normal
from torch import Tensor

from cogcache.cache.format import IMAGES, Entry, SampleRecord
from cogcache.config import TrainConfig
from cogcache.train.data import Micro, Samples
from cogcache.train.model import trainable
from cogcache.train.objective import padded_frames
from cogcache.variants import Variant

__all__ = ["draws", "gradients", "inputs", "loss", "precision", "round_trip"]


def close(ours: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def inputs(stock: Stock) -> None:
    """The transformer is given in training, row by row, what the pipeline gives it at that row's timestep.

    Noisy latents (scale, posterior sample, padding, noise schedule), image condition (scale, place, zeros), text,
    timestep, rotary tables and ofs.
    """
    ours, _ = stock.observed()
    for row, (theirs, _) in enumerate(stock.steps):
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            close(ours[name][row], theirs[name][row])
        close(ours.get("ofs"), theirs.get("ofs"))
        close(ours["image_rotary_emb"], theirs["image_rotary_emb"], rtol=0, atol=0)
    assert ours.keys() <= {*stock.steps[0][0], "ofs"}


def loss(stock: Stock) -> None:
    """The loss of each sample is the squared error of what the pipeline's own transformer call predicted."""
    with torch.no_grad():
        ours = stock.loss(stock.trained)
    clean = _clean(stock)
    for row, (_, predicted) in enumerate(stock.steps):
        target = stock.pipe.scheduler.get_velocity(clean, stock.noise, TIMESTEPS[row].expand(BATCH))
        close(ours[row], (predicted[row] - target[row]).square().mean(), rtol=1e-4)


def gradients(stock: Stock) -> None:
    """LoRA gradients are those that the pipeline's transformer, with the LoRA from our file, gives."""
    stock.trained.zero_grad()
    stock.loss(stock.trained).mean().backward()
    ours = {name: p.grad for name, p in trainable(stock.trained).items()}
    transformer = stock.pipe.transformer
    adapter = {n: p.requires_grad_() for n, p in transformer.named_parameters() if ".lora_" in n}
    transformer.zero_grad()
    clean = _clean(stock)
    for row, (given, _) in enumerate(stock.steps):
        one = {k: v[row : row + 1] if k in _ROWS else v for k, v in given.items()}
        target = stock.pipe.scheduler.get_velocity(clean, stock.noise, TIMESTEPS[row].expand(BATCH))[row]
        error = transformer(**one)[0][0] - target
        (error.square().mean() / BATCH).backward()
    theirs = {name.replace(".default_0.", ".default."): p.grad for name, p in adapter.items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        largest = float(gradient.abs().max())
        close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * largest)


_ROWS = ("hidden_states", "encoder_hidden_states", "timestep")


def _clean(stock: Stock) -> Tensor:
    """Scaled latents by the pipeline's factor, copies of the first frame in front [B, P, C, H, W]."""
    scaled = (stock.sample * stock.pipe.vae_scaling_factor_image).transpose(1, 2)
    missing = stock.padded - scaled.shape[1]
    return torch.cat([scaled[:, :1].expand(-1, missing, -1, -1, -1), scaled], dim=1)


def round_trip(stock: Stock) -> None:
    """With a transformer that predicts exactly our target, the pipeline hands its VAE the latents that we encoded.

    Its step from our noisy latents, its dropping of padding frames and its scale before decoding all undo what
    training does, so nothing here repeats a formula of ours.
    """
    ours, target = stock.observed()
    noisy = ours["hidden_states"][:, :, : stock.variant.latent_channels]
    transformer, vae = stock.pipe.transformer, stock.pipe.vae
    picture, decoded = stock.picture, []
    transformer.forward = lambda **_: (target[row : row + 1],)
    vae.decode = lambda latents: decoded.append(latents) or SimpleNamespace(sample=latents)
    try:
        for row in range(BATCH):
            stock.picture = None if picture is None else picture[row:]
            stock.call(noisy[row : row + 1], TIMESTEPS[row : row + 1], output_type="pt")
    finally:
        stock.picture = picture
        del transformer.forward, vae.decode
    close(torch.cat(decoded), stock.sample, atol=1e-4)


def precision(stock: Stock) -> None:
    """With a bfloat16 model the noisy input is the exact one rounded once, and target and loss keep float32."""
    low, target = stock.observed(torch.bfloat16)
    clean, abar = _clean(stock).double(), stock.pipe.scheduler.alphas_cumprod[TIMESTEPS].double()
    abar = abar.view(-1, 1, 1, 1, 1)
    exact = abar.sqrt() * clean + (1 - abar).sqrt() * stock.noise.double()
    wanted = abar.sqrt() * stock.noise.double() - (1 - abar).sqrt() * clean
    noisy = low["hidden_states"][:, :, : stock.variant.latent_channels]
    assert noisy.dtype == torch.bfloat16
    assert ((noisy.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    close(target.double(), wanted)
    answer = normal(*stock.noise.shape, seed=9).bfloat16()
    losses = stock.loss(lambda **_: (answer,), dtype=torch.bfloat16)
    assert losses.dtype == torch.float32
    close(losses.double(), (answer.double() - wanted).square().flatten(1).mean(1), atol=0)


def draws(variant: Variant) -> None:
    """In a batch of equal samples, each has a timestep, noise, posterior, image and dropouts of its own, each epoch."""
    samples = _shelf(variant, 32)
    first, later = (samples.batch(Micro(epoch, tuple(range(32)), 32)) for epoch in (0, 1))
    for batch in (first, later):
        for name in ("noise_bpchw", "posterior_noise_bcfhw"):
            rows = getattr(batch, name)
            assert len({row.numpy().tobytes() for row in rows}) == 32, f"{name} is shared within the batch"
        assert len(set(batch.timesteps_b.tolist())) > 20, "timesteps are shared within the batch"
        assert _shares(batch.prompt_embeds_bld[:, 0, 0]) == {0.0, 1.0}, "captions are dropped together"
        if batch.image_latents_bcfhw is not None:
            seen = _shares(batch.image_latents_bcfhw[:, 0, 0, 0, 0])
            assert 0.0 in seen, "image conditions are dropped together"
            assert len(seen) > 4, "the draw of the bank is shared within the batch"
    for name in ("noise_bpchw", "posterior_noise_bcfhw", "timesteps_b", "prompt_embeds_bld"):
        assert not torch.equal(getattr(first, name), getattr(later, name)), (
            f"{name} is that of the epoch before"
        )


def _shares(values: Tensor) -> set[float]:
    return set(values.tolist())


def _shelf(variant: Variant, count: int) -> Samples:
    """``count`` samples that differ in their ids alone: text is ones (or zeros, where dropped), image K is K + 1."""
    bank = tuple(str(number) for number in range(8)) if variant.task == "i2v" else ()
    shape = (2 * variant.latent_channels, 3, 2, 2)

    def read(series: str, key: str) -> Entry:
        if series == IMAGES:
            return Entry(key, {"latents": torch.full((shape[0] // 2, 1, 2, 2), float(key) + 1)})
        return Entry(key, {"prompt_embeds": torch.full((4, 4), float(key == "text"))})

    records = [
        SampleRecord(
            id=f"clip {number}", source="a.mp4", window="start", caption="a", sha256="0" * 64,
            frames=9, height=16, width=16, fps=8.0, latents="latents", text="text", images=bank,
        )
        for number in range(count)
    ]  # fmt: skip
    reader: Any = SimpleNamespace(
        samples=records,
        read=read,
        moments=lambda _: torch.zeros(shape),
        manifest=SimpleNamespace(unconditional="empty"),
        root="shelf",
    )
    config = TrainConfig(shards="shelf", caption_dropout=0.4, image_dropout=0.4)
    samples = Samples(reader, variant, config)
    assert samples.batch(Micro(0, (0,), 1)).noise_bpchw.shape[1] == padded_frames(3, variant.patch_size_t)
    assert samples.batch(Micro(0, (0,), 1)).noise_bpchw.device == CPU
    return samples
