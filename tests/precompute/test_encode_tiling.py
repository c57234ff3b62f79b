"""Tiled encoding: when it is chosen, when it is refused, and what it does to a cache's identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogcache.cache.format import LATENTS
from cogcache.config import EncodeConfig
from cogcache.errors import GeometryError, MismatchError
from cogcache.geometry import Bucket, Size
from cogcache.precompute import choose_tiling as choosing
from cogcache.precompute import encode_all
from cogcache.precompute.choose_tiling import choose_tiling, untiled_bytes
from cogcache.precompute.settings import decide
from cogcache.precompute.vae import FrozenVae, _tiles_add_up, to_pixels, vae_fingerprint
from cogcache.tiny import Family

CPU = torch.device("cpu")
HD, LONG = Bucket(49, 480, 720), Bucket(161, 480, 720)


@pytest.mark.parametrize(
    ("tile", "heights", "widths"),
    [
        ((48, 80), (48, 64, 96, 112, 160), (80, 96, 144, 208)),
        ((64, 64), (48, 64, 96, 112, 160), (80, 96, 144, 208)),
        ((240, 360), (256,), (368,)),
    ],
)
def test_refuses_just_what_diffusers_cannot_tile(
    tiny_models: Callable[[Family], Path],
    tile: tuple[int, int],
    heights: tuple[int, ...],
    widths: tuple[int, ...],
) -> None:
    frozen = FrozenVae(tiny_models("5b"), "float32", tiled=True, device=CPU)
    frozen._vae.enable_tiling(tile_sample_min_height=tile[0], tile_sample_min_width=tile[1])
    outcomes = set()
    for size in (Size(height, width) for height in heights for width in widths):
        try:
            right = _latent_shape(frozen, size) == (size.height // 8, size.width // 8)
        except RuntimeError:  # a last tile smaller than a convolution's kernel
            right = False
        accepted = True
        try:
            frozen.check_size(size)
        except GeometryError:
            accepted = False
        assert accepted == right, size
        outcomes.add(right)
    assert outcomes == ({True, False} if tile == (64, 64) else {True})


def _latent_shape(frozen: FrozenVae, size: Size) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(
            frozen._vae.encode(torch.zeros(1, 3, 1, size.height, size.width)).latent_dist.mean.shape[-2:]
        )


@pytest.mark.parametrize("size", [Size(480, 720), Size(768, 1360), Size(480, 832), Size(720, 480)])
def test_real_sizes_can_be_tiled(size: Size) -> None:
    """With tiles of half the 480x720 of the published VAEs, 240x360."""
    assert _tiles_add_up(size.height, 240, 1 / 6)
    assert _tiles_add_up(size.width, 360, 1 / 5)


def test_refused_before_anything_is_encoded(
    settings: Callable[..., EncodeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_tiles(self: FrozenVae, root: Path, dtype: str, *, tiled: bool, device: torch.device) -> None:
        original(self, root, dtype, tiled=tiled, device=device)
        self._vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)

    original = FrozenVae.__init__
    monkeypatch.setattr(FrozenVae, "__init__", half_tiles)
    config = settings(tiling="on", size="96x160")
    with pytest.raises(GeometryError, match=r"cannot be encoded in tiles of 64 pixels.*--tiling off"):
        encode_all(config)
    assert not list(config.shards.rglob("*.tar"))


def test_tiles_change_the_latents_and_the_fingerprint(tiny_models: Callable[[Family], Path]) -> None:
    root = tiny_models("5b")
    noise = torch.randint(256, (1, 9, 96, 160, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = FrozenVae(root, "float32", tiled=False, device=CPU)
    tiled = FrozenVae(root, "float32", tiled=True, device=CPU)
    tiled.check_size(Size(96, 160))
    assert whole.encode(noise).shape == tiled.encode(noise).shape
    assert not torch.equal(whole.encode(noise), tiled.encode(noise))
    off, on = (vae_fingerprint(root, "float32", tiled=choice) for choice in (False, True))
    assert {name for name in off if off[name] != on[name]} == {"vae_tiling"}


def test_slicing_changes_nothing(tiny_models: Callable[[Family], Path]) -> None:
    """FrozenVae always slices: a batch gives what its clips give one by one."""
    root = tiny_models("5b")
    noise = torch.randint(256, (2, 9, 32, 48, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    frozen = FrozenVae(root, "float32", tiled=False, device=CPU)
    both = frozen.encode(noise)
    assert torch.equal(both, torch.cat([frozen.encode(noise[:1]), frozen.encode(noise[1:])]))
    stock = AutoencoderKLCogVideoX.from_pretrained(root, subfolder="vae")
    with torch.no_grad():
        one = stock.encode(to_pixels(noise[:1])).latent_dist.parameters
    assert torch.equal(both[:1], one)


def test_auto_keeps_what_the_cache_has(settings: Callable[..., EncodeConfig]) -> None:
    config = settings(tiling="on", size="48x96")
    first = encode_all(config)
    assert first.manifest is not None
    assert first.manifest.series[LATENTS].fingerprint["vae_tiling"] == "48x80 overlap 1/6 1/5"
    again = config.model_copy(update={"tiling": "auto"})
    assert decide(again).tiled
    assert encode_all(again).encoded == 0
    with pytest.raises(MismatchError, match="vae_tiling"):
        encode_all(config.model_copy(update={"tiling": "off"}))
    assert not decide(settings(shards=config.shards.with_name("new"))).tiled


def test_what_untiled_encoding_takes_is_near_what_was_measured() -> None:
    """Peaks on one H200, of benchmarks/records/2026-11-22-encoding.md: never above what is counted with."""
    for kernels, bucket, gib in (
        (True, HD, 6.38),
        (False, HD, 8.48),
        (True, Bucket(17, 768, 1360), 17.6),
        (False, Bucket(17, 768, 1360), 24.1),
    ):
        assert 1 <= untiled_bytes(bucket, "bfloat16", kernels=kernels) / 2**30 / gib < 1.15
    assert untiled_bytes(HD, "float32", kernels=True) > 1.9 * untiled_bytes(HD, "bfloat16", kernels=True)


def test_pixels_that_wait_are_counted() -> None:
    """Frames beyond those the encoder works on: one clip in bfloat16 and four in bytes."""
    more = untiled_bytes(LONG, "bfloat16", kernels=True) - untiled_bytes(HD, "bfloat16", kernels=True)
    assert more == 3 * (161 - 49) * 480 * 720 * (2 + 4)


def test_auto_tiles_where_some_bucket_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    free = (untiled_bytes(HD, "bfloat16", kernels=True) + untiled_bytes(LONG, "bfloat16", kernels=True)) / 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), 0))
    monkeypatch.setattr(choosing, "has_kernels", lambda _: True)
    assert [choose_tiling(wanted, [LONG], "bfloat16", gpu) for wanted in ("auto", "on", "off")] == [
        True,
        True,
        False,
    ]
    assert not choose_tiling("auto", [HD], "bfloat16", gpu)
    assert choose_tiling("auto", [Bucket(9, 480, 720), LONG, HD], "bfloat16", gpu)
    assert not choose_tiling("auto", [LONG], "bfloat16", CPU)
