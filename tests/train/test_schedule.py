"""The learning rate against diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.optimization import get_scheduler

from cogcache.config import TrainConfig
from cogcache.train.schedule import learning_rate

KINDS = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_rates_are_those_of_diffusers(settings: Callable[..., TrainConfig], kind: str, warmup: int) -> None:
    config = settings(steps=20, lr=1e-3, lr_scheduler=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(25):
        assert learning_rate(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_warm_up_longer_than_the_run_only_rises(settings: Callable[..., TrainConfig]) -> None:
    config = settings(steps=4, lr=1.0, lr_scheduler="cosine", warmup_steps=10)
    assert [learning_rate(config, step) for step in range(4)] == [0.0, 0.1, 0.2, 0.3]
