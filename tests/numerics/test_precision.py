"""What low precision costs, and where it is kept out.

Mutations tried, each caught: see ``test_fidelity`` ("noise added in bfloat16", "target rounded to bfloat16").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.tiny import Family
from cogcache.train.engine import PlainEngine
from cogcache.train.model import load_scheduler
from cogcache.train.objective import add_noise, alphas_cumprod, loss_per_sample
from cogcache.variants import read_variant

Models = Callable[[Family], Path]
CPU = torch.device("cpu")
STEPS = torch.arange(1000)


def variance_error(noisy: Tensor, exact: Tensor) -> Tensor:
    """Relative error of the noise's variance at each timestep, from unit noise on a zero latent."""
    return ((noisy.double().flatten().square() - exact) / exact).abs()


@pytest.mark.parametrize(
    ("family", "dtype", "lost", "wrong", "rounding"),
    [
        ("5b", torch.bfloat16, 2, (0.015, 0.03), 2**-7),
        ("2b", torch.bfloat16, 0, (0.003, 0.03), 2**-7),
        ("2b", torch.float16, 0, (0.0, 0.02), 2**-10),
    ],
)
def test_noising_in_low_precision_is_wrong_at_small_timesteps(
    tiny_models: Models,
    family: Family,
    dtype: torch.dtype,
    lost: int,
    wrong: tuple[float, float],
    rounding: float,
) -> None:
    """The scheduler's own ``add_noise`` in the model's dtype, at all timesteps, and ours, which rounds once.

    In bfloat16 the first two timesteps of 5B get no noise at all, and about 2% of all timesteps are off by more
    than 5% in the noise's variance.
    """
    scheduler = load_scheduler(tiny_models(family))
    exact = 1 - scheduler.alphas_cumprod.double()
    zeros, ones = torch.zeros(1000, 1), torch.ones(1000, 1)
    naive = variance_error(scheduler.add_noise(zeros.to(dtype), ones.to(dtype), STEPS), exact)
    ours = variance_error(add_noise(zeros, ones, alphas_cumprod(scheduler, CPU)).to(dtype), exact)
    assert int((naive == 1).sum()) == lost
    assert (naive[:lost] == 1).all()
    assert wrong[0] <= (naive > 0.05).double().mean().item() <= wrong[1]
    assert naive.max() > 5 * ours.max()
    assert ours.max() <= 1.1 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_transformers_input_is_rounded(tiny_models: Models, dtype: torch.dtype) -> None:
    """Inputs of any dtype, a model in ``dtype``: what it sees is rounded once, and the loss is float32."""
    root = tiny_models("2b")
    variant, scheduler = read_variant(root), load_scheduler(root)
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 3, 4, 6, generator=source).to(dtype)
    noise = torch.randn(2, 3, 16, 4, 6, generator=source)
    timesteps = torch.tensor([0, 3])
    seen: list[Tensor] = []

    def transformer(**given: Tensor) -> tuple[Tensor]:
        seen.extend((given["hidden_states"], given["encoder_hidden_states"]))
        return (torch.zeros_like(given["hidden_states"]),)

    losses = loss_per_sample(
        transformer,
        scheduler,
        latents,
        torch.zeros(2, 226, 32),
        noise_bpchw=noise,
        timesteps_b=timesteps,
        variant=variant,
        dtype=dtype,
    )
    clean = latents.double().transpose(1, 2) * variant.scaling_factor
    abar = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1, 1)
    exact = abar.sqrt() * clean + (1 - abar).sqrt() * noise.double()
    assert [tensor.dtype for tensor in seen] == [dtype, dtype]
    assert (
        torch.equal(seen[0], exact.float().to(dtype))
        or ((seen[0].double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    )
    wanted = (abar.sqrt() * noise.double() - (1 - abar).sqrt() * clean).square().flatten(1).mean(1)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=0)


FINITE = torch.tensor(False)
"""No loss was refused."""


def engine(dtype: torch.dtype) -> tuple[PlainEngine, nn.Parameter]:
    """An engine over one float32 parameter of ones."""
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    config = TrainConfig(shards=Path("none"), lr=0.1, weight_decay=0.0, device="cpu")
    return PlainEngine(config, Accelerator(cpu=True), layer, {"w": layer.weight}, dtype), layer.weight


def test_an_overflow_in_float16_leaves_the_step_out_and_halves_the_scale() -> None:
    trained, weight = engine(torch.float16)
    before = trained.scaler.get_scale()
    trained.backward((weight * 3e38).sum())
    overflown = trained.step(0.1, FINITE)
    assert (overflown.norm, overflown.halted) == (float("inf"), False)
    assert torch.equal(weight, torch.ones(1, 4))
    assert trained.scaler.get_scale() == before / 2
    assert weight.grad is None
    trained.backward((weight * 2.0).sum())
    assert trained.step(0.1, FINITE).norm.item() == pytest.approx(4.0)  # the norm of the unscaled gradient
    assert (weight < 1).all()


def test_a_scale_that_has_shrunk_to_nothing_is_an_error_and_other_dtypes_have_no_scale() -> None:
    trained, weight = engine(torch.float16)
    for _ in range(40):
        trained.backward((weight * float("inf")).sum())
        if trained.scaler.get_scale() < 1:
            break
        assert not trained.step(0.1, FINITE).halted
    assert trained.step(0.1, FINITE).halted
    plain, weight = engine(torch.bfloat16)
    assert plain.scaler_state() == {}
    plain.backward((weight * float("inf")).sum())
    assert plain.step(0.1, FINITE).halted
    plain.backward((weight * 2.0).sum())
    assert plain.step(0.1, FINITE).halted  # once is for all steps after it
    assert torch.equal(weight, torch.ones(1, 4))
