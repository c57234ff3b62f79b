"""Moments with 8-bit log-variances: means bit for bit, log-variances to half a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cache_kit import VARIANT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogcache.cache.contents import Expectation, content_fault
from cogcache.cache.format import LATENTS, Entry
from cogcache.cache.moments import LOGVAR_SLACK, moments_of, pack_moments, unpack_moments
from cogcache.cache.stored import contents_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BUCKET = "9x32x48"
ROUNDING = 4e-6
"""Of float32, at 30."""
either = pytest.mark.parametrize("dtype", DTYPES)


def every_value(dtype: str) -> Tensor:
    """All 2^16 bit patterns that stand for a finite number, padded with zeros, as [4, F, 8, 8]."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    finite = torch.where(values.isfinite(), values, torch.zeros_like(values))
    return finite.reshape(4, -1, 8, 8)


@either
def test_means_keep_every_bit_and_log_variances_are_near(dtype: str) -> None:
    values = every_value(dtype)
    packed = pack_moments(torch.cat([values, values]))
    assert packed.dtype == torch.uint8
    assert packed.shape == (12, *values.shape[1:])
    mean, logvar = unpack_moments(packed, dtype).chunk(2)
    assert torch.equal(mean.to(DTYPES[dtype]).view(torch.int16), values.view(torch.int16))
    apart = (logvar.double() - values.double().clamp(-30, 20)).abs().max().item()
    assert 0.97 * LOGVAR_SLACK < apart <= LOGVAR_SLACK + ROUNDING
    assert pytest.approx(25 / 255) == LOGVAR_SLACK


@either
def test_every_code_stands_for_its_log_variance(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    logvar = unpack_moments(torch.cat([torch.zeros_like(codes)] * 2 + [codes]), dtype)[1].flatten().double()
    wanted = torch.tensor([-30 + k * 50 / 255 for k in range(256)], dtype=torch.float64)
    assert (logvar - wanted).abs().max() < ROUNDING
    assert logvar[0] == -30
    assert logvar[153] == pytest.approx(0, abs=ROUNDING)
    assert logvar[255] == pytest.approx(20, abs=ROUNDING)


def test_planes_lie_as_the_specification_says() -> None:
    mean = torch.tensor([0x1234, 0x0102], dtype=torch.int16).view(torch.bfloat16).reshape(2, 1, 1, 1)
    logvar = torch.tensor([-100.0, 20.0], dtype=torch.bfloat16).reshape(2, 1, 1, 1)
    packed = pack_moments(torch.cat([mean, logvar]))
    assert packed.flatten().tolist() == [0x34, 0x02, 0x12, 0x01, 0, 255]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 5),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.floats(-40, 30),
    st.integers(0, 2**32),
)
def test_any_shape_and_layout(
    dtype: str, channels: int, shape: tuple[int, int, int], centre: float, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    whole = torch.randn(2, 2 * channels, *shape, generator=source) * 3 + centre
    moments = whole.to(DTYPES[dtype]).permute(0, 1, 2, 4, 3)[1]  # not contiguous
    found = unpack_moments(pack_moments(moments), dtype)
    mean, logvar = moments.chunk(2)
    assert torch.equal(found[:channels], mean.float())
    stored, clamped = found[channels:].double(), logvar.double().clamp(-30, 20)
    assert (stored - clamped).abs().max() <= LOGVAR_SLACK + ROUNDING
    ratio = ((stored - clamped) / 2).exp()
    assert ratio.max() < 1.051
    assert ratio.min() > 1 / 1.051


def test_what_is_no_such_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bits"):
        pack_moments(torch.zeros(4, 1, 2, 2))
    packed = pack_moments(torch.zeros(4, 1, 2, 2).half())
    for wrong in (packed[:5], packed[0], packed.int()):
        with pytest.raises(ValueError, match="3C, F, H, W"):
            unpack_moments(wrong, "float16")
    for dtype in ("float32", "None", "uint8"):
        with pytest.raises(ValueError, match="16 bits"):
            unpack_moments(packed, dtype)
    with pytest.raises(ValueError, match="no moments"):
        moments_of({"latents": packed}, "float16")
    full = torch.zeros(4, 1, 2, 2)
    assert moments_of({"moments": full}, None) is full


def fault(tensors: dict[str, Tensor], **fingerprint: Any) -> str:
    expected = Expectation(LATENTS, VARIANT, {"vae_dtype": "bfloat16", **fingerprint}, BUCKET)
    return content_fault(expected, "0" * 32, contents_of(Entry("0" * 32, tensors, {"bucket": BUCKET})))


def test_a_check_knows_which_form_a_cache_has() -> None:
    """Mutations tried, each caught: name, channels, dtype, finite means not looked at."""
    moments = torch.randn(8, 3, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = {"moments_8bit": pack_moments(moments)}
    assert fault(packed, log_variance="8bit") == ""
    assert fault({"moments": moments}, log_variance="full") == fault({"moments": moments}) == ""
    assert "not 'moments_8bit'" in fault({"moments": moments}, log_variance="8bit")
    assert "not 'moments'" in fault(packed, log_variance="full")
    assert "not 'moments'" in fault(packed)
    assert "not uint8" in fault({"moments_8bit": packed["moments_8bit"].half()}, log_variance="8bit")
    assert "[12, 3, 4, 6]" in fault({"moments_8bit": packed["moments_8bit"][:8]}, log_variance="8bit")
    assert "16 bits" in fault(packed, log_variance="8bit", vae_dtype="float32")
    for wrong in (math.nan, math.inf):
        mean = moments.clone()
        mean[1, 2, 3, 4] = wrong
        assert "not finite" in fault({"moments_8bit": pack_moments(mean)}, log_variance="8bit")
