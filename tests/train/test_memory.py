"""Memory measures change where things are kept, never what is computed.

On the CPU all arithmetic is the same, so losses, gradients and whole runs are compared bit for bit with diffusers' own
blocks. Mutations tried, each caught: gradients of a block's two parts not added; the weights of another block used; key
and value exchanged in attention's backward pass; the last projection skipped where it is trained; the wrong gate on the
text's gradient; the optimizer's step count not kept. What streams and events do is not seen on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.train import train
from cogcache.train.memory.blocks import BlockRunner, install
from cogcache.train.memory.host import CopyStreams, HostPool
from cogcache.train.memory.measures import TIERS, Measures
from cogcache.train.memory.stock import compile_blocks
from cogcache.train.model import add_lora, load_scheduler, load_transformer, trainable
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.variants import read_variant

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]

CPU = torch.device("cpu")
FAMILIES: list[Family] = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
MEASURES = {
    "recompute all": Measures(),
    "keep all": Measures(recompute=False),
    "attention on the device": Measures(attention="device"),
    "inputs on the host": Measures(inputs="host"),
    "weights on the host": Measures(weights="host"),
    "all on the host": Measures(attention="host", inputs="host", weights="host"),
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [
    *ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
    "time_embedding.linear_1",
]


COMPILING = pytest.mark.filterwarnings("ignore")
"""torch's compiler warns of what torch itself does; as errors these would end it."""


def with_lora(root: Path, targets: list[str]) -> Any:
    transformer = load_transformer(root, torch.float32)
    add_lora(transformer, TrainConfig(shards=Path("unused"), rank=3, alpha=2.0, target_modules=targets))
    for number, (name, parameter) in enumerate(trainable(transformer).items()):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return transformer


def losses(transformer: Any, root: Path, steps: int) -> Iterator[Tensor]:
    variant, scheduler = read_variant(root), load_scheduler(root)
    shape = variant.latent_shape(variant.sample_frames, variant.default_size)
    c, f, h, w = shape
    for step in range(steps):
        source = torch.Generator().manual_seed(step)

        def normal(*shape: int, source: torch.Generator = source) -> Tensor:
            return torch.randn(shape, generator=source)

        yield loss_per_sample(
            transformer,
            scheduler,
            normal(2, 2 * c, f, h, w),
            normal(2, variant.text_length, variant.text_dim),
            noise_bpchw=normal(2, padded_frames(f, variant.patch_size_t), c, h, w),
            timesteps_b=torch.tensor([(100 + 37 * step) % 1000, 900]),
            variant=variant,
            posterior_noise_bcfhw=normal(2, c, f, h, w),
            image_latents_bcfhw=normal(2, c, 1, h, w) if variant.task == "i2v" else None,
        )


def gradients(transformer: Any, root: Path, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of some microbatches, and their gradients added up."""
    found = []
    for loss_b in losses(transformer, root, steps):
        loss_b.sum().backward()
        found.append(loss_b.detach())
    return found, {name: p.grad for name, p in trainable(transformer).items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "targets"),
    [*((family, ATTENTION) for family in FAMILIES), ("5b", EVERYWHERE), ("1.5-5b-i2v", EVERYWHERE)],
    ids=[*FAMILIES, "5b everywhere", "1.5-5b-i2v everywhere"],
)
def test_gradients_are_those_of_the_stock_blocks(
    family: Family, targets: list[str], tiny_models: Models
) -> None:
    root = tiny_models(family)
    expected_losses, expected = gradients(with_lora(root, targets), root, 2)
    assert len(expected) == len(trainable(with_lora(root, targets)))
    for name, measures in MEASURES.items():
        transformer = with_lora(root, targets)
        install(transformer, measures, CPU)
        found_losses, found = gradients(transformer, root, 2)
        assert all(map(torch.equal, found_losses, expected_losses)), name
        assert found.keys() == expected.keys()
        for parameter, grad in found.items():
            if targets == ATTENTION:
                assert torch.equal(grad, expected[parameter]), (name, parameter)
            else:  # gradients that two parts of a block share are added in another order
                torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["5b", "1.5-5b-i2v"])
def test_twenty_steps_are_the_same(
    family: Family, settings: Settings, make_cache: Callable[..., Path], metrics: Any, tmp_path: Path
) -> None:
    """With accumulation, batches of two buckets, and validation in between.

    Matrix products may round differently where weights begin at another address, so tiers that move them to the host
    are equal to each other, and to the rest but for rounding.
    """
    clips = [(9, Size(32, 48))] * 3 + ([(17, Size(32, 48))] * 2 if family == "5b" else [])
    shards = make_cache(family, clips)
    common = {"shards": shards, "steps": 20, "batch_size": 2, "grad_accum": 2, "lr": 1e-3}
    common |= {"gradient_checkpointing": None, "holdout": "20%", "validate_every": 10, "rank": 4}
    runs = {}
    for tier in ("plain", "fast", "balanced", "small", "tiny"):
        extra = {} if tier == "plain" else {"compile": False}
        result = train(settings(**common, memory=tier, output=tmp_path / tier, **extra))
        runs[tier] = load_file(result.lora), metrics(result.output)
    for tier, same in (("fast", "plain"), ("balanced", "plain"), ("tiny", "small")):
        assert runs[tier][1] == runs[same][1], tier
        assert all(torch.equal(tensor, runs[same][0][name]) for name, tensor in runs[tier][0].items()), tier
    for line, other in zip(runs["small"][1], runs["plain"][1], strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() & {"loss", "grad_norm", "validation_loss"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_run_goes_on_under_another_tier(settings: Settings, tmp_path: Path) -> None:
    common = {"checkpoint_every": 2, "gradient_checkpointing": None, "compile": False}
    whole = train(settings(**common, steps=6, memory="small", output=tmp_path / "whole"))
    part = {**common, "output": tmp_path / "parts"}
    train(settings(**part, steps=2, memory="tiny"))
    train(settings(**part, steps=4, memory="small", resume="latest"))
    done = train(settings(**part, steps=6, memory="tiny", resume="latest"))
    assert done.lora.read_bytes() == whole.lora.read_bytes()


@pytest.mark.slow
@COMPILING
def test_compiled_blocks_differ_by_rounding_only(tiny_models: Models) -> None:
    root = tiny_models("5b")
    _, expected = gradients(with_lora(root, ATTENTION), root, 2)
    for measures in (TIERS["fast"], TIERS["small"]):
        transformer = with_lora(root, ATTENTION)
        install(transformer, measures, CPU)
        _, found = gradients(transformer, root, 2)
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_blocks_run_compiled_in_training_alone(
    tiny_models: Models, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """What is compiled is each block's own forward, once a pass; the compiler here only looks on."""
    root = tiny_models("5b")
    plain, transformer = (with_lora(root, ATTENTION) for _ in range(2))
    for model in (plain, transformer):
        model.train()
        model.enable_gradient_checkpointing() if checkpointing else None
    _, expected = gradients(plain, root, 2)
    runs = []

    def compiler(forward: Any, *, dynamic: bool) -> Any:
        assert dynamic is False
        return lambda *inputs, **named: (runs.append(forward), forward(*inputs, **named))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    compile_blocks(transformer)
    _, found = gradients(transformer, root, 2)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())
    blocks = len(transformer.transformer_blocks)
    assert len(set(runs)) == blocks
    assert len(runs) == 2 * blocks * (2 if checkpointing else 1)
    with torch.no_grad():
        list(losses(transformer, root, 1))
    transformer.eval()
    list(losses(transformer, root, 1))
    assert len(runs) == 2 * blocks * (2 if checkpointing else 1)


@pytest.mark.slow
@COMPILING
def test_stock_blocks_really_compiled_differ_by_rounding_only(tiny_models: Models) -> None:
    root = tiny_models("5b")
    plain, transformer = (with_lora(root, ATTENTION) for _ in range(2))
    _, expected = gradients(plain.train(), root, 2)
    compile_blocks(transformer.train())
    _, found = gradients(transformer, root, 2)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_without_gradient_the_model_is_the_same(tiny_models: Models) -> None:
    root = tiny_models("5b")
    with torch.no_grad():
        (expected,) = losses(with_lora(root, ATTENTION), root, 1)
        for measures in MEASURES.values():
            transformer = with_lora(root, ATTENTION)
            install(transformer, measures, CPU)
            (found,) = losses(transformer, root, 1)
            assert torch.equal(found, expected)


def test_host_weights_leave_nothing_behind_and_lose_nothing(tiny_models: Models) -> None:
    root = tiny_models("5b")
    transformer = with_lora(root, ATTENTION)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    install(transformer, MEASURES["all on the host"], CPU)
    gradients(transformer, root, 2)
    after = transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_forward_pass_without_backward_does_no_harm(tiny_models: Models) -> None:
    """An exception between forward and backward, then the next step."""
    root = tiny_models("5b")
    _, expected = gradients(with_lora(root, ATTENTION), root, 1)
    transformer = with_lora(root, ATTENTION)
    install(transformer, MEASURES["all on the host"], CPU)
    list(losses(transformer, root, 1))
    _, found = gradients(transformer, root, 1)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_the_pool_reuses_buffers_and_keeps_odd_layouts() -> None:
    pool = HostPool(CopyStreams(CPU))
    base = torch.randn(3, 8, 5)
    for tensor in (base.transpose(0, 2), base[:, 2:6], base.to(torch.bfloat16), base[0, 0]):
        assert torch.equal(pool.get(pool.put(tensor)), tensor)
    taken = pool.bytes
    kept = [pool.put(base), pool.put(base + 1)]
    assert pool.bytes == taken + base.nbytes  # one of the two sizes had a free buffer of its own
    assert torch.equal(pool.get(kept[1]), base + 1)
    assert torch.equal(pool.get(kept[0]), base)
    for _ in range(3):
        pool.get(pool.put(base))
    assert pool.bytes == taken + base.nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "small", "lora_dropout": 0.1}, "--lora-dropout"),
        ({"memory": "plain", "base_weights": "host"}, "--base-weights"),
        ({"memory": "auto", "keep_inputs": "host"}, "--keep-inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(settings(gradient_checkpointing=None, **changes))


def test_the_runner_is_what_runs(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of the above would compare the stock blocks with themselves."""
    calls = []
    forward = BlockRunner.forward
    monkeypatch.setattr(
        BlockRunner, "forward", lambda self, index, *rest: calls.append(index) or forward(self, index, *rest)
    )
    root = tiny_models("5b")
    transformer = with_lora(root, ATTENTION)
    install(transformer, MEASURES["recompute all"], CPU)
    gradients(transformer, root, 1)
    assert calls == [0, 1, 2]
