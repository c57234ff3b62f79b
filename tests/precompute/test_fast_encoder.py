"""The encoder for GPUs gives what diffusers' gives, run by run and tile by tile; its kernels give what torch gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from cogcache.precompute import fused
from cogcache.precompute.fast_encoder import FastEncoder, can_take_over

CPU = torch.device("cpu")


def random_vae(channels: tuple[int, ...] = (16, 16, 32, 32), groups: int = 8) -> Any:
    """A small VAE whose norms and biases do something, in float64, so that a wrong step cannot pass for rounding."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=channels, layers_per_block=2, latent_channels=4, norm_num_groups=groups
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_().add_(0.5)
    return vae.eval().requires_grad_(False)


def fast(vae: Any) -> Any:
    taken = copy.deepcopy(vae)
    taken.encoder = FastEncoder(taken.encoder)
    return taken


def apart(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def vae() -> Any:
    return random_vae()


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17, 25, 81])
def test_runs_of_frames_give_what_diffusers_gives(vae: Any, frames: int) -> None:
    pixels = torch.rand(1, 3, frames, 16, 24) * 2 - 1
    expected = vae.encode(pixels).latent_dist.parameters
    result = fast(vae).encode(pixels).latent_dist.parameters
    assert result.shape == expected.shape
    assert apart(result, expected) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("tiled", [False, True])
def test_batches_and_tiles_give_what_diffusers_gives(vae: Any, tiled: bool) -> None:
    pixels = torch.rand(2, 3, 9, 64, 96) * 2 - 1
    both = [vae, fast(vae)]
    for one in both:
        one.use_tiling = False
        if tiled:
            one.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=64)
    expected, result = (one.encode(pixels).latent_dist.parameters for one in both)
    vae.use_tiling = False
    assert apart(result, expected) < 1e-5


@torch.inference_mode()
def test_the_largest_convolutions_are_done_in_parts(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(1, 3, 17, 16, 24) * 2 - 1
    expected = vae.encode(pixels).latent_dist.parameters
    monkeypatch.setattr("cogcache.precompute.fast_encoder._LARGEST", 30_000)
    assert apart(fast(vae).encode(pixels).latent_dist.parameters, expected) < 1e-5


@torch.inference_mode()
def test_what_the_frames_before_left_is_let_go_on_the_way(vae: Any) -> None:
    encoder = FastEncoder(copy.deepcopy(vae.encoder))
    _, left = encoder(torch.rand(1, 3, 9, 16, 24))
    names = set(left)
    _, left_again = encoder(torch.rand(1, 3, 8, 16, 24), conv_cache=left)
    assert not left
    assert set(left_again) == names


@torch.inference_mode()
def test_sixteen_bits_are_as_near_to_thirty_two_as_those_of_diffusers(vae: Any) -> None:
    """At real size they are nearer (benchmarks/records/2026-11-22-encoding.md); here only much worse would show."""
    pixels = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    exact = vae.encode(pixels).latent_dist.parameters
    half, sixteen = copy.deepcopy(vae).to(torch.bfloat16), pixels.to(torch.bfloat16)
    stock = apart(half.encode(sixteen).latent_dist.parameters, exact)
    ours = apart(fast(half).encode(sixteen).latent_dist.parameters, exact)
    assert 0 < ours < 1.1 * stock


def _other_activation(encoder: Any) -> None:
    encoder.mid_block.resnets[0].nonlinearity = nn.GELU()


def _other_padding(encoder: Any) -> None:
    encoder.conv_in.pad_mode = "replicate"


def _other_shortcut(encoder: Any) -> None:
    encoder.down_blocks[0].resnets[0].use_conv_shortcut = True


def _plain_norm(encoder: Any) -> None:
    encoder.norm_out = nn.GroupNorm(8, 32, affine=False)


@pytest.mark.parametrize("change", [_other_activation, _other_padding, _other_shortcut, _plain_norm])
def test_leaves_other_encoders_alone(vae: Any, change: Callable[[Any], None]) -> None:
    encoder = copy.deepcopy(vae.encoder)
    assert can_take_over(encoder)
    change(encoder)
    assert not can_take_over(encoder)


def test_leaves_norms_of_odd_groups_alone() -> None:
    assert not can_take_over(random_vae((12, 12, 24, 24), 4).encoder)


def test_kernels_are_for_cuda_alone() -> None:
    assert not fused.has_kernels(CPU)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("no NVIDIA GPU here: this test is run by 'pytest -m gpu' on one")
    return torch.device("cuda")


@pytest.fixture
def kernels_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(fused, "has_kernels", lambda _device: False)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 8, 9])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [32, 128, 512])
@pytest.mark.parametrize("residual", [False, True])
def test_kernels_give_what_torch_gives(
    cuda: torch.device,
    kernels_off: Callable[[], None],
    frames: int,
    batch: int,
    channels: int,
    residual: bool,
) -> None:
    torch.manual_seed(frames)
    shape = (batch, frames, 37, 51, channels)
    x, other = (torch.randn(shape, device=cuda) * 2 + 30 for _ in range(2))
    bias = torch.randn(channels, device=cuda)
    norm = nn.GroupNorm(8, channels, eps=1e-6, device=cuda)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    before = torch.randn(batch, 2, 37, 51, channels, device=cuda)

    def everything() -> list[Tensor]:
        total, affine = fused.add(x, bias, other if residual else None, norm)
        behind = fused.norm_statistics(x, bias, norm)
        return [
            total,
            *affine,
            *behind,
            fused.norm_silu(total, None, affine, before),
            fused.norm_silu(x, bias, behind, None),
            fused.add_and_pool(x, bias, other, in_time=True),
            fused.add_and_pool(x, bias, other, in_time=False),
        ]

    by_kernels = everything()
    again = everything()
    assert all(torch.equal(one, two) for one, two in zip(by_kernels, again, strict=True))
    kernels_off()
    for kernel, plain in zip(by_kernels, everything(), strict=True):
        torch.testing.assert_close(kernel, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_encoder_on_a_gpu_is_as_near_to_float32_as_that_of_diffusers(
    cuda: torch.device, dtype: torch.dtype
) -> None:
    stock = random_vae((32, 32, 64, 64), 32).to(cuda)
    pixels = torch.rand(1, 3, 17, 64, 96, device=cuda) * 2 - 1
    exact = stock.encode(pixels).latent_dist.parameters
    half = copy.deepcopy(stock).to(dtype)
    apart_stock = apart(half.encode(pixels.to(dtype)).latent_dist.parameters, exact)
    ours = apart(fast(half).encode(pixels.to(dtype)).latent_dist.parameters, exact)
    assert 0 < ours < 1.1 * apart_stock
