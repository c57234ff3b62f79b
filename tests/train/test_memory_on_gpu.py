"""On a GPU, compiled and in bfloat16, as real runs are, every memory tier trains as diffusers' own blocks do.

What a CPU cannot show: kernels of a GPU, attention's among them; what the compiler makes of a block's parts; copies to
and from the host on streams of their own. As in ``test_memory_precision`` the reference is float32 with the same
weights, here without TF32 and with attention by plain products, and itself held against a CPU's. A tier is compared
with it twice, each time beside plain blocks in bfloat16, not compiled:

- the gradients of two microbatches added up, and the predictions, with that module's bounds. Compiled kernels round
  less often, so a tier may well be nearer to float32 than plain blocks are;
- twenty steps of AdamW, two microbatches each: the losses on the way, and what they changed in the LoRA.

Tiers differ in where things are kept. Attention's backward kernels add in no fixed order, so they need not agree bit
for bit (it is printed which do), but they are hardly further from each other than plain blocks are from float32.

The models are tiny but for their heads, which are as wide as real ones: the choice of attention's kernel depends on
that. Nearly all the time is the compiler's, so each family may have a process of its own (``-n 6``); ``-k '[5b]'``, in
brackets, is that family and no other. ``-rP`` prints what is measured.

Mutations tried, on a CPU and not compiled, each caught: the LoRA's scale 2% too large; what is kept on the host 1% too
large; another beta in the optimizer on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_kit import ATTENTION, CPU, EVERYWHERE, FAMILIES, losses, rounded, with_lora
from test_memory_precision import (
    ALL,
    KIND,
    LOSS,
    PREDICTIONS,
    _Step,
    error,
    errors,
    loss_error,
    run,
    same,
    told,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogcache.config import TrainConfig
from cogcache.int8 import values_of
from cogcache.tiny import Family, build_tiny_model
from cogcache.train.devices import set_matmul_precision
from cogcache.train.memory.blocks import install
from cogcache.train.memory.measures import TIERS, TINY, Measures, Tier
from cogcache.train.model import trainable
from cogcache.train.optimizer import make_optimizer, optimizer_state, update_unless

Models = Callable[[Family], Path]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of what torch itself does
]

HEAD = 64
"""Channels of a head of every real model."""
STEPS = 20
TRAINED = 1.5
"""How many times the error of plain blocks a tier's may be after twenty steps: of the losses, for which ``LOSS`` is
added, as they differ by chance; and of what was changed in the LoRA. Every step begins where the one before ended, so
errors of rounding, which are independent, grow apart."""
FLOAT32 = 3e-5
"""How far two orders of float32 sums may be apart. TF32 would be ten times as far."""


@dataclass(frozen=True)
class _Run:
    """What a transformer gave: one step's gradients; then the losses of twenty steps, and what they changed."""

    step: _Step
    losses: Tensor
    changes: list[Tensor]


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("no NVIDIA GPU here: this test is run by 'pytest -m gpu' on one")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """As ``tiny_models``, with heads of :data:`HEAD` channels."""
    root = tmp_path_factory.mktemp("tiny-models-with-real-heads")

    def model(family: Family) -> Path:
        folder = root / family
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cogcache.tiny.families._HEAD_DIM", HEAD)
            return folder if folder.exists() else build_tiny_model(folder, family)

    return model


@pytest.fixture(autouse=True)
def _precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def float32_throughout() -> Iterator[None]:
    """No TF32, neither in products nor in convolutions, and attention by plain products."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with sdpa_kernel(SDPBackend.MATH):
        yield


def train(transformer: Any, root: Path, measures: Measures | None) -> _Run:
    """One step's gradients, which are let go, then twenty steps as :class:`PlainEngine` makes them."""
    step, parameters = run(transformer, root), trainable(transformer)
    transformer.zero_grad(set_to_none=True)
    config = TrainConfig(shards=Path("unused"), lr=1e-3)
    on_host = measures is not None and measures.optimizer == "host"
    optimizer = make_optimizer(config, parameters, on_host=on_host)
    begun, found = [p.detach().clone() for p in parameters.values()], list[Tensor]()
    for number, loss_b in enumerate(losses(transformer, root, 2 * STEPS), 1):
        (loss_b.mean() / 2).backward()
        found.append(loss_b.detach())
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            update_unless(optimizer, torch.zeros((), dtype=torch.bool, device=loss_b.device))
            optimizer.zero_grad(set_to_none=True)
    moments = [value for name, value in optimizer_state(optimizer, parameters).items() if "exp_avg" in name]
    assert {value.is_cpu for value in moments} == {on_host or loss_b.is_cpu}
    changes = [p.detach() - start for p, start in zip(parameters.values(), begun, strict=True)]
    return _Run(step, torch.cat(found), changes)


def train_under(root: Path, targets: list[str], measures: Measures, device: torch.device) -> tuple[_Run, int]:
    """Also how many graphs were compiled. The compiler has seen no other tier, as in a run of this one alone."""
    torch._dynamo.reset()
    counters.clear()
    transformer = with_lora(root, targets, torch.bfloat16)
    install(transformer, measures, device)
    found = train(transformer, root, measures)
    blocks = transformer.transformer_blocks
    frozen = [p for p in blocks.parameters() if not p.requires_grad and values_of(p) is None]
    assert {p.is_cpu for p in frozen} == {measures.weights == "host" or device == CPU}
    assert not counters["graph_break"]
    return found, counters["stats"]["unique_graphs"]


def train_plain(
    root: Path, targets: list[str], device: torch.device, change: Callable[[Any], Any] = lambda model: model
) -> tuple[_Run, _Run]:
    """By diffusers' own blocks: in float32, which must be what a CPU gives; and in bfloat16, as in real runs.

    Args:
        change: Of the model beforehand.
    """
    with float32_throughout():
        transformer = change(with_lora(root, targets, torch.float32, stored=torch.bfloat16))
        on_cpu = run(transformer, root)
        transformer = change(with_lora(root, targets, torch.float32, stored=torch.bfloat16)).to(device)
        exact = train(transformer, root, None)
    grads = on_cpu.gradients
    drift = error((exact.step.gradients[name].cpu() for name in grads), grads.values())
    print(f"float32: gradients {drift:.1e} from a CPU's")
    assert drift < FLOAT32
    set_matmul_precision(device, torch.bfloat16)
    plain = train(change(with_lora(root, targets, torch.bfloat16)).to(device), root, None)
    return exact, plain


def trained_errors(found: _Run, exact: _Run) -> tuple[float, float]:
    """Of the losses of twenty steps, and of what these changed."""
    return error([found.losses], [exact.losses]), error(found.changes, exact.changes)


def apart(steps: list[_Step]) -> float:
    """The largest difference between the gradients of any two."""
    return max(errors(one, other)["all"] for one in steps for other in steps)


def report(name: str, found: _Run, plain: _Run, exact: _Run) -> None:
    """A line of all errors, and how many times those of plain blocks they are."""
    ratios, worst = gradient_ratios(found, plain, exact)
    wrong = trained_errors(found, exact)
    times = [mine / usual for mine, usual in zip(wrong, trained_errors(plain, exact), strict=True)]
    print(
        f"{name}: {told(errors(found.step, exact.step))}, losses {loss_error(found.step, exact.step):.1e}; "
        f"{ratios['all']:.3f} and {ratios['predictions']:.3f} times plain, {worst} {ratios[worst]:.2f} times; "
        f"{STEPS} steps: losses {wrong[0]:.2e}, changes {wrong[1]:.2e}; {times[0]:.2f} and {times[1]:.2f} times plain"
    )


def gradient_ratios(found: _Run, plain: _Run, exact: _Run) -> tuple[dict[str, float], str]:
    """How many times the errors of plain blocks one step's are, and for which kind of tensor that is the worst."""
    usual, wrong = errors(plain.step, exact.step), errors(found.step, exact.step)
    ratios = {what: wrong[what] / usual[what] for what in usual}
    return ratios, max(ratios.keys() - {"all", "predictions"}, key=lambda kind: ratios[kind])


def check(tier: str, found: _Run, plain: _Run, exact: _Run) -> None:
    ratios, worst = gradient_ratios(found, plain, exact)
    assert {grad.dtype for grad in found.step.gradients.values()} == {torch.float32}
    assert ratios["all"] < ALL, tier
    assert ratios["predictions"] < PREDICTIONS, tier
    assert ratios[worst] < KIND, (tier, worst)
    assert loss_error(found.step, exact.step) < LOSS, tier
    (wrong_losses, wrong_changes), usual = trained_errors(found, exact), trained_errors(plain, exact)
    assert wrong_losses < TRAINED * usual[0] + LOSS, tier
    assert wrong_changes < TRAINED * usual[1], tier


@pytest.mark.parametrize(
    ("family", "targets"),
    [*((family, ATTENTION) for family in FAMILIES), ("1.5-5b-i2v", EVERYWHERE)],
    ids=[*FAMILIES, "1.5-5b-i2v-everywhere"],
)
def test_compiled_tiers_train_as_plain_blocks_do(
    family: Family, targets: list[str], models: Models, cuda: torch.device
) -> None:
    root = models(family)
    exact, plain = train_plain(root, targets, cuda)
    usual, (usual_losses, usual_changes) = errors(plain.step, exact.step), trained_errors(plain, exact)
    assert usual["all"] > 1e-3  # else nothing was computed in bfloat16
    print(
        f"{family}, plain: {told(usual)}, losses {loss_error(plain.step, exact.step):.1e}; "
        f"{STEPS} steps: losses {usual_losses:.2e}, changes {usual_changes:.2e}"
    )
    runs = dict[Tier, _Run]()
    for tier, measures in TIERS.items():
        runs[tier], graphs = train_under(root, targets, measures, cuda)
        report(f"{family}, {tier}, {graphs} graphs", runs[tier], plain, exact)
        assert graphs, tier
    steps = [one.step for one in runs.values()]
    equal = [tier for tier, one in runs.items() if same(one.step, runs["balanced"].step)]
    by_optimizer = error(runs["tiny"].changes, runs["small"].changes)
    print(
        f"{family}: gradients of tiers {apart(steps):.2e} apart; those of {', '.join(equal)} equal; changes of small "
        f"and tiny {by_optimizer:.2e} apart"
    )
    for tier, found in runs.items():
        check(tier, found, plain, exact)
    assert apart(steps) < ALL * usual["all"]
    assert by_optimizer < usual_changes  # where the optimizer's state is, is all they differ in


@pytest.mark.parametrize("family", ["5b", "1.5-5b-i2v"])
def test_in_8_bits_they_train_as_plain_blocks_with_rounded_weights_do(
    family: Family, models: Models, cuda: torch.device
) -> None:
    """The 8 bits in host memory, and on the GPU."""
    root = models(family)
    exact, plain = train_plain(root, ATTENTION, cuda, lambda model: rounded(model, torch.bfloat16))
    for measures in (TINY[-1], replace(TINY[-1], weights="device")):
        found, _ = train_under(root, ATTENTION, measures, cuda)
        report(f"{family}, 8 bits on the {measures.weights}", found, plain, exact)
        check("tiny", found, plain, exact)
