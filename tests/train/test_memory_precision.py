"""In bfloat16, which real runs compute in, every memory tier is as near to float32 as diffusers' own blocks are.

The reference is a float32 model of the same weights, which bfloat16 holds exactly, with the same LoRA, clips, noise
and timesteps. What bfloat16 costs is a random error of 0.5 to 1.2% in the gradients and of 0.6 to 0.7% in the
predictions. The tiers compute the LoRA's products in bfloat16 and PEFT in float32, so they cannot agree bit for bit;
but all the rest is rounded either way, and the tiers add little. Over 37 cases (families, targets, draws, LoRAs a tenth
to three times as strong) a tier's error was 0.79 to 1.10 times that of plain blocks over all tensors, up to 1.22 times
over those of one kind, and 0.99 to 1.014 times for the predictions; the bounds leave about as much again. ``-rP``
prints what is measured.

Mutations tried, each caught, by the factors above or by the tiers' equality with each other or with plain
predictions: the rotary sign exchanged; a rotary position in bfloat16; the LoRA's scale dropped; its A detached; the
base's products rounded once more; a kept attention output 1% too large, or with its heads shifted; a kept log-sum-exp
rounded; the gates of video and text exchanged; gradients of a block's two parts not added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_kit import ATTENTION, CPU, EVERYWHERE, FAMILIES, gradients, losses, with_lora
from torch import Tensor

from cogcache.tiny import Family
from cogcache.train.memory.blocks import install
from cogcache.train.memory.measures import TIERS, Measures
from cogcache.train.model import trainable

Models = Callable[[Family], Path]

ALL, KIND, PREDICTIONS = 1.2, 1.4, 1.03
"""How many times the error of plain blocks a tier's may be: of all gradients, of those of one kind of tensor (such as
the A of all ``to_q``), of the predictions."""
LOSS = 2**-9
"""Half of what rounding one number to bfloat16 may cost. A loss is a mean over thousands of elements whose errors
cancel, but by chance: how many times plain's error a tier's is says nothing of losses, and much of predictions."""


@dataclass(frozen=True)
class _Step:
    """What one step of two microbatches of two samples gave."""

    losses: Tensor
    predictions: Tensor
    gradients: dict[str, Tensor]


def without_optimizer(measures: Measures) -> Measures:
    """As there is none here. Nothing is compiled."""
    return replace(measures, compile=False, optimizer="device")


def run(transformer: Any, root: Path) -> _Step:
    predictions = watch(transformer)
    found, grads = gradients(transformer, root, 2)
    return _Step(torch.cat(found), torch.cat(predictions), grads)


def watch(transformer: Any) -> list[Tensor]:
    """What it will predict."""
    predictions: list[Tensor] = []
    transformer.register_forward_hook(lambda _model, _given, out: predictions.append(out[0].detach()))
    return predictions


def error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Norm of the differences over the norm of what is exact."""
    pairs = [(one.double(), other.double()) for one, other in zip(found, exact, strict=True)]
    wrong = sum((one - other).square().sum() for one, other in pairs)
    return float((wrong / sum(other.square().sum() for _, other in pairs)) ** 0.5)


def errors(step: _Step, exact: _Step) -> dict[str, float]:
    """That of the predictions, of all gradients, and of those of each kind of tensor."""
    assert step.gradients.keys() == exact.gradients.keys()
    kinds: dict[str, list[str]] = {"all": list(exact.gradients)}
    for name in exact.gradients:
        kinds.setdefault(_kind(name), []).append(name)
    found = {"predictions": error([step.predictions], [exact.predictions])}
    return found | {kind: error(_picked(step, names), _picked(exact, names)) for kind, names in kinds.items()}


def _kind(name: str) -> str:
    """A tensor's name without its block."""
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)


def _picked(step: _Step, names: Iterable[str]) -> list[Tensor]:
    return [step.gradients[name] for name in names]


def loss_error(step: _Step, exact: _Step) -> float:
    """The worst relative error of a sample's loss."""
    return float(((step.losses - exact.losses) / exact.losses).abs().max())


def same(step: _Step, other: _Step) -> bool:
    return torch.equal(step.losses, other.losses) and all(
        torch.equal(grad, other.gradients[name]) for name, grad in step.gradients.items()
    )


def told(found: Mapping[str, float]) -> str:
    return f"gradients {found['all']:.2e}, predictions {found['predictions']:.2e}"


@pytest.mark.parametrize(
    ("family", "targets"),
    [*((family, ATTENTION) for family in FAMILIES), ("1.5-5b-i2v", EVERYWHERE)],
    ids=[*FAMILIES, "1.5-5b-i2v everywhere"],
)
def test_bfloat16_costs_no_more_than_in_plain_blocks(
    family: Family, targets: list[str], tiny_models: Models
) -> None:
    """And the tiers do not differ from each other, for what they do differently is where things are kept."""
    root = tiny_models(family)
    exact = run(with_lora(root, targets, torch.float32, stored=torch.bfloat16), root)
    plain = run(with_lora(root, targets, torch.bfloat16), root)
    usual, steps = errors(plain, exact), dict[Measures, _Step]()
    assert usual["all"] > 1e-3  # else nothing was computed in bfloat16
    assert loss_error(plain, exact) < LOSS
    print(f"{family}, plain: {told(usual)}, losses {loss_error(plain, exact):.1e}")
    for tier, measures in TIERS.items():
        how = without_optimizer(measures)
        if how not in steps:
            transformer = with_lora(root, targets, torch.bfloat16)
            install(transformer, how, CPU)
            steps[how] = run(transformer, root)
        step = steps[how]
        found = errors(step, exact)
        ratios = {what: found[what] / usual[what] for what in usual}
        worst = max(ratios.keys() - {"all", "predictions"}, key=lambda kind: ratios[kind])
        print(
            f"{family}, {tier}: {told(found)}, losses {loss_error(step, exact):.1e}; {ratios['all']:.3f} and "
            f"{ratios['predictions']:.3f} times plain, {worst} {ratios[worst]:.2f} times"
        )
        assert {grad.dtype for grad in step.gradients.values()} == {torch.float32}
        assert ratios["all"] < ALL, tier
        assert ratios["predictions"] < PREDICTIONS, tier
        assert ratios[worst] < KIND, (tier, worst)
        assert loss_error(step, exact) < LOSS, tier
    # Where both parts of a block use a trained layer, "fast" adds its gradients in another order; "tiny" always does.
    alike = [
        step for how, step in steps.items() if (how.recompute or targets == ATTENTION) and not how.in_parts
    ]
    assert len(alike) == (3 if targets == ATTENTION else 2)
    assert all(same(step, alike[0]) for step in alike[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_lora_adds_nothing_bfloat16_predicts_the_same(family: Family, tiny_models: Models) -> None:
    """B is zero, as before the first step; so all that is left is the same arithmetic, and equal bit for bit."""
    root = tiny_models(family)

    def predict(measures: Measures | None) -> Tensor:
        transformer = with_lora(root, ATTENTION, torch.bfloat16)
        for name, parameter in trainable(transformer).items():
            if "lora_B" in name:
                parameter.data.zero_()
        if measures is not None:
            install(transformer, measures, CPU)
        predictions = watch(transformer)
        list(losses(transformer, root, 1))
        (prediction,) = predictions
        assert prediction.dtype == torch.bfloat16
        return prediction

    expected = predict(None)
    for measures in dict.fromkeys(map(without_optimizer, TIERS.values())):
        assert torch.equal(predict(measures), expected), measures
