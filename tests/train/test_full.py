"""Training all weights: what is trained, in which precision, what is written, and that stops change nothing.

Mutations tried, each caught: masters in the compute dtype; autocast left out; buffers
not written; optimizer or weights not restored; the result in float32; the LoRA's flags let through.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.config_io import load_config
from cogcache.errors import CheckpointError, ConfigError, MismatchError
from cogcache.finetuned import read_finetuned
from cogcache.geometry import Size
from cogcache.tiny import Family, build_tiny_model
from cogcache.train import full, shards, train
from cogcache.train.data import Samples, step_plans
from cogcache.train.model import load_scheduler, load_transformer
from cogcache.train.objective import loss_per_sample
from cogcache.train.optimizer import make_optimizer
from cogcache.train.positions import rotary_tables

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]
NEEDED = {
    "shards", "model", "output", "steps", "batch_size", "grad_accum", "lr", "eps", "dtype", "device", "workers",
    "checkpoint_every", "keep_checkpoints", "gradient_checkpointing", "resume", "max_grad_norm",
}  # fmt: skip


@pytest.fixture
def all_weights(settings: Settings) -> Settings:
    """Settings of a short training of all weights of the tiny 5B model."""

    def make(**changes: Any) -> TrainConfig:
        values = settings(**{"lr": 1e-3, **changes}).model_dump(include=NEEDED)
        return TrainConfig(**values, training_type="full")

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_the_result_is_a_transformer_in_diffusers_layout(
    all_weights: Settings, make_cache: Any, tiny_models: Models, family: Family
) -> None:
    shards = make_cache(family, [(9, Size(64, 96))])
    result = train(all_weights(shards=shards, steps=2))
    assert result.weights == result.output / "transformer"
    trained = CogVideoXTransformer3DModel.from_pretrained(result.output, subfolder="transformer")
    base = load_transformer(tiny_models(family), torch.float32)
    assert {k: v for k, v in trained.config.items() if k != "_name_or_path"} == {
        k: v for k, v in base.config.items() if k != "_name_or_path"
    }
    pairs = dict(zip(dict(base.named_parameters()), base.parameters(), strict=True))
    moved = [name for name, p in trained.named_parameters() if not torch.equal(p, pairs[name])]
    assert len(moved) > 0.9 * len(pairs)  # a key's bias has no gradient
    for name, buffer in base.named_buffers():
        assert torch.equal(dict(trained.named_buffers())[name], buffer)
    provenance, manifest = read_finetuned(result.output).provenance, CacheReader(shards).manifest
    assert provenance.base_model == str(tiny_models(family))
    assert (provenance.variant, provenance.fingerprint) == (manifest.model.variant, manifest.fingerprint())
    assert (provenance.frames, provenance.size, provenance.fps) == (9, "64x96", 8.0)
    assert json.loads((result.output / "cogcache.json").read_text())["training_type"] == "full"
    assert not list(result.output.rglob("*.tmp"))


def test_a_step_is_that_of_plain_torch(all_weights: Settings, tiny_models: Models, metrics: Any) -> None:
    """In float32: same loss, same gradient norm, same weights after clipping and AdamW, to the bit."""
    config = all_weights(batch_size=2, steps=1)
    result = train(config)
    reader = CacheReader(config.shards)
    samples = Samples(reader, reader.manifest.model.variant, config)
    plan = next(step_plans(samples.records, config, 1))
    batch = samples.batch(plan.micros[0][0])
    model = load_transformer(tiny_models("5b"), torch.float32).requires_grad_(True)
    loss_b = loss_per_sample(
        model,
        load_scheduler(tiny_models("5b")),
        batch.moments_bcfhw,
        batch.prompt_embeds_bld,
        noise_bpchw=batch.noise_bpchw,
        timesteps_b=batch.timesteps_b,
        variant=samples.variant,
        posterior_noise_bcfhw=batch.posterior_noise_bcfhw,
    )
    (loss_b.sum() / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    make_optimizer(config, dict(model.named_parameters())).step()
    line = metrics(result.output)[0]
    assert line["loss"] == pytest.approx(loss_b.mean().item(), rel=1e-6)
    assert line["grad_norm"] == norm.item()
    after = weights(result.weights)
    assert after.keys() == model.state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16_computes_low_and_keeps_float32_masters(
    all_weights: Settings, tmp_path: Path, metrics: Any
) -> None:
    """Steps far smaller than the distance of bfloat16 numbers must add up."""
    model = build_tiny_model(tmp_path / "model", "5b", dtype="bfloat16")
    common = {"model": str(model), "steps": 2, "lr": 1e-6, "checkpoint_every": 2}
    low = train(all_weights(output=tmp_path / "low", **common))
    exact = train(all_weights(output=tmp_path / "exact", dtype="float32", **common))
    masters = weights(low.output / "checkpoint-000002" / "transformer")
    before = {n: t.float() for n, t in weights(model / "transformer").items()}
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert sum(not torch.equal(masters[n], before[n]) for n in before) > 0.9 * len(before)
    saved = weights(low.weights)
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[n], masters[n].to(torch.bfloat16)) for n in saved)
    for ours, theirs in zip(metrics(low.output), metrics(exact.output), strict=True):
        assert ours["loss"] != theirs["loss"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


def test_autocast_covers_the_transformer_alone(tiny_models: Models, variant_of: Any) -> None:
    model = load_transformer(tiny_models("5b"), torch.float32)
    full.train_everything(model, torch.device("cpu"), torch.bfloat16)
    seen = []
    model.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    variant = variant_of("5b")
    shape, device = (3, 4, 6), torch.device("cpu")
    rotary_tables.cache_clear()
    loss_b = loss_per_sample(
        model,
        load_scheduler(tiny_models("5b")),
        torch.randn(1, 16, *shape),
        torch.randn(1, variant.text_length, variant.text_dim),
        noise_bpchw=torch.randn(1, 3, 16, 4, 6),
        timesteps_b=torch.tensor([0]),
        variant=variant,
        dtype=torch.bfloat16,
    )
    under = rotary_tables(variant, *shape, device)
    rotary_tables.cache_clear()
    assert all(map(torch.equal, under, rotary_tables(variant, *shape, device)))
    assert seen == [torch.bfloat16]
    assert loss_b.dtype == torch.float32
    loss_b.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_float16_is_scaled(all_weights: Settings, make_cache: Any, tmp_path: Path, metrics: Any) -> None:
    model = build_tiny_model(tmp_path / "model", "2b", dtype="float16")
    common = {"shards": make_cache("2b"), "model": str(model), "steps": 1, "checkpoint_every": 1}
    runs = [train(all_weights(output=tmp_path / d, dtype=d, **common)) for d in ("auto", "float32")]
    norms = [metrics(run.output)[0]["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert json.loads((runs[0].output / "checkpoint-000001" / "trainer_state.json").read_text())["scaler"]


def test_stopped_and_lengthened_runs_end_like_whole_ones(
    all_weights: Settings, tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tensors are spread over several files, and whichever batch sizes and checkpointing."""
    whole = train(all_weights(output=tmp_path / "whole", steps=4, batch_size=2))
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    half = all_weights(output=tmp_path / "half", steps=2, batch_size=2, checkpoint_every=2)
    train(half)
    checkpoint = half.output / "checkpoint-000002"
    assert len(list(checkpoint.glob("optimizer-*-of-*.safetensors"))) > 1
    assert len(list((checkpoint / "transformer").glob("*-of-*.safetensors"))) > 1
    resumed = train(half.model_copy(update={"steps": 4, "resume": "latest", "gradient_checkpointing": True}))
    after, expected = weights(resumed.weights), weights(whole.weights)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert metrics(resumed.output) == metrics(whole.output)
    for folder in (resumed.output, checkpoint):
        stock = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        assert stock.state_dict().keys() == after.keys()
    assert torch.equal(
        next(stock.parameters()), weights(checkpoint / "transformer")["patch_embed.proj.weight"]
    )


def test_killed_runs_end_like_undisturbed_ones(
    all_weights: Settings, make_cache: Any, train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    config = all_weights(
        shards=make_cache("2b"), output=tmp_path / "whole", steps=4, checkpoint_every=1, keep_checkpoints=2,
        resume="latest",
    )  # fmt: skip
    codes, seconds = train_server.run(config)
    assert codes == [0], train_server.log.read_text()
    draw, output = random.Random(1), tmp_path / "killed"
    for _ in range(3):
        kill_after = draw.uniform(0.3, 0.9) * seconds
        codes, _ = train_server.run(config.model_copy(update={"output": output}), kill_after=kill_after)
        assert codes in ([0], [-signal.SIGKILL]), train_server.log.read_text()
    codes, _ = train_server.run(config.model_copy(update={"output": output}))
    assert codes == [0], train_server.log.read_text()
    assert contents(output / "transformer") == contents(config.output / "transformer")
    assert metrics(output) == metrics(config.output)


def test_what_does_not_fit_is_refused(all_weights: Settings, settings: Settings, tmp_path: Path) -> None:
    result = train(all_weights(steps=1, checkpoint_every=1))
    with pytest.raises(ConfigError, match=r"already holds a run \(transformer, metrics"):
        train(all_weights(steps=2))
    with pytest.raises(MismatchError) as caught:
        train(settings(steps=2, resume="latest"))
    assert caught.value.differences["training_type"] == ("full", "lora")
    weights_file = next((tmp_path / "run" / "checkpoint-000001" / "transformer").glob("*.safetensors"))
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"transformer/diffusion_pytorch_model\.safetensors is not what"
    ):
        train(all_weights(steps=2, resume="latest"))
    assert result.weights.exists()


def test_lora_flags_are_refused_and_not_recorded(tmp_path: Path, all_weights: Settings) -> None:
    given = {"shards": str(tmp_path), "training_type": "full"}
    for name, value in (("rank", 128), ("alpha", 64), ("target_modules", ["to_q"])):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"full trains no LoRA: leave {flag} out"):
            load_config(TrainConfig, {**given, name: value})
    result = train(all_weights(steps=1))
    again = load_config(TrainConfig, {}, result.output / "config.yaml")
    assert again.training_type == "full"
    assert "rank" not in again.model_dump()


def test_the_result_acts_in_the_stock_pipeline(all_weights: Settings, tiny_models: Models) -> None:
    result = train(all_weights(steps=3))
    trained = CogVideoXTransformer3DModel.from_pretrained(result.output, subfolder="transformer")
    options = {
        "prompt": "a", "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 1, "output_type": "latent",
    }  # fmt: skip
    videos = []
    for changes in ({}, {"transformer": trained}):
        pipe = CogVideoXPipeline.from_pretrained(tiny_models("5b"), **changes)
        pipe.set_progress_bar_config(disable=True)
        videos.append(pipe(**options, generator=torch.Generator().manual_seed(0)).frames)
    assert torch.isfinite(videos[1]).all()
    assert not torch.equal(*videos)
