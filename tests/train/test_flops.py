"""Counted operations of a step are those that torch counts while it runs one.

Mutations tried, each caught: attention's backward pass counted as four products; the first block's inputs counted as
if they needed a gradient; the last projection counted again; LoRA's second product left out; rows of text left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cogcache.config import TrainConfig
from cogcache.geometry import Bucket, Size
from cogcache.tiny import Family
from cogcache.train.flops import Flops, StepFlops, step_flops
from cogcache.train.memory.blocks import install
from cogcache.train.memory.measures import TIERS, Measures
from cogcache.train.model import add_lora, load_scheduler, load_transformer
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.variants import Variant, read_variant

Models = Callable[[Family], Path]
FAMILIES: list[Family] = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
LORA = TrainConfig(shards=Path("unused"), rank=3)
EVERYWHERE = [
    "to_q",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
    "patch_embed.text_proj",
]


class Counter(TorchDispatchMode):
    """``FlopCounterMode`` without its names of modules, which do not go together with gradients within gradients."""

    def __init__(self) -> None:
        super().__init__()
        aten = torch.ops.aten
        self.total, self._formulas = 0, dict(flop_registry)  # which count attention on GPUs alone
        self._formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
        self._formulas[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def counted(transformer: Any, root: Path, bucket: Bucket, batch: int) -> tuple[int, int]:
    """Operations of the forward pass, and of the rest of a microbatch, by torch."""
    variant, scheduler = read_variant(root), load_scheduler(root)
    c, f, h, w = variant.latent_shape(bucket.frames, bucket.size)
    with Counter() as counter:
        loss = loss_per_sample(
            transformer,
            scheduler,
            torch.randn(batch, 2 * c, f, h, w),
            torch.randn(batch, variant.text_length, variant.text_dim),
            noise_bpchw=torch.randn(batch, padded_frames(f, variant.patch_size_t), c, h, w),
            timesteps_b=torch.full((batch,), 500),
            variant=variant,
            posterior_noise_bcfhw=torch.randn(batch, c, f, h, w),
            image_latents_bcfhw=torch.randn(batch, c, 1, h, w) if variant.task == "i2v" else None,
        )
        forward = counter.total
        loss.sum().backward()
    return forward, counter.total - forward


def bucket_of(variant: Variant) -> Bucket:
    """One with padding frames where the model allows it."""
    return Bucket.of(17, variant.default_size) if variant.fixed_grid else Bucket.of(9, Size(32, 48))


def check(
    transformer: Any, root: Path, batch: int, measures: Measures | None = None, rel: float = 0
) -> StepFlops:
    variant = read_variant(root)
    bucket = bucket_of(variant)
    flops = step_flops(transformer, variant, bucket, batch, measures)
    forward, rest = counted(transformer, root, bucket, batch)
    assert flops.forward.total == pytest.approx(forward, rel=rel, abs=0)
    assert flops.backward.total + flops.recomputed.total == pytest.approx(rest, rel=rel, abs=0)
    return flops


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_blocks_with_a_lora(family: Family, tiny_models: Models, checkpointing: bool) -> None:
    root = tiny_models(family)
    transformer: Any = load_transformer(root, torch.float32)
    add_lora(transformer, LORA)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    flops = check(transformer, root, 2)
    assert bool(flops.recomputed.total) == checkpointing
    assert flops.total == flops.needed + flops.recomputed.total


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_trained(family: Family, tiny_models: Models) -> None:
    transformer = load_transformer(tiny_models(family), torch.float32).requires_grad_(True)
    check(transformer, tiny_models(family), 1)


@pytest.mark.parametrize("targets", [LORA.target_modules, EVERYWHERE], ids=["attention", "everywhere"])
@pytest.mark.parametrize("measures", [*TIERS.values(), Measures()], ids=[*TIERS, "recompute all"])
def test_memory_tiers(measures: Measures, targets: list[str], tiny_models: Models) -> None:
    """The timestep's shifts and gates are computed once more by blocks in two parts: a hundredth at these sizes."""
    root = tiny_models("5b")
    transformer = load_transformer(root, torch.float32)
    add_lora(transformer, LORA.model_copy(update={"target_modules": targets}))
    measures = Measures(**{**vars(measures), "compile": False})
    install(transformer, measures, torch.device("cpu"))
    flops = check(transformer, root, 1, measures, rel=0.01)
    assert bool(flops.recomputed.linear) == measures.recompute
    assert bool(flops.recomputed.attention) == (measures.recompute and measures.attention is None)


def test_a_model_without_weights_counts_the_same(tiny_models: Models) -> None:
    root = tiny_models("1.5-5b")
    transformer = load_transformer(root, torch.float32)
    add_lora(transformer, LORA)
    variant = read_variant(root)
    expected = step_flops(transformer, variant, bucket_of(variant))
    assert step_flops(transformer.to("meta"), variant, bucket_of(variant)) == expected
    assert expected.forward + Flops(1, 2) == Flops(
        expected.forward.linear + 1, expected.forward.attention + 2
    )
