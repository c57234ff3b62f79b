"""Training on clips of several lengths and shapes.

Mutations tried, each caught: a step's loss divided by the full batch; position tables of the first shape for all;
batches over two buckets; sample videos in the shape of most clips where the pictures have another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making_caches import Clip
from safetensors.torch import load_file

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.draws import generator, uniform
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.train import train
from cogcache.train.model import add_lora, load_scheduler, load_transformer, trainable
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.train.run import provenance_of
from cogcache.train.validation import VideoShape
from cogcache.variants import read_variant

Settings = Callable[..., TrainConfig]
MakeCache = Callable[..., Path]

CLIPS: list[Clip] = [(9, Size(32, 48))] * 5 + [(17, Size(48, 32))] * 3


def by_hand(config: TrainConfig, model: Path, lines: list[dict[str, Any]]) -> None:
    """Loss and gradient norm of every step, one clip at a time; weights hardly move, so each step stands alone."""
    reader, variant, scheduler = CacheReader(config.shards), read_variant(model), load_scheduler(model)
    transformer = load_transformer(model, torch.float32)
    add_lora(transformer, config)
    rows = {row.id: row for row in reader.samples}
    for line in lines:
        transformer.zero_grad()
        for sample in line["samples"]:
            row, draw = rows[sample["id"]], (config.seed, line["epoch"], sample["id"])
            c, f, h, w = variant.latent_shape(row.frames, Size(row.height, row.width))
            padded = padded_frames(f, variant.patch_size_t)
            timestep = int(uniform(*draw, "timestep") * 1000)
            (loss,) = loss_per_sample(
                transformer,
                scheduler,
                reader.read("latents", row.latents).tensors["moments"][None],
                reader.read("text", row.text).tensors["prompt_embeds"][None],
                noise_bpchw=torch.randn((padded, c, h, w), generator=generator(*draw, "noise"))[None],
                timesteps_b=torch.tensor([timestep]),
                variant=variant,
                posterior_noise_bcfhw=torch.randn((c, f, h, w), generator=generator(*draw, "posterior"))[
                    None
                ],
            )
            assert sample["t"] == timestep
            assert sample["loss"] == pytest.approx(loss.item(), rel=1e-5)
            (loss / len(line["samples"])).backward()
        assert line["loss"] == pytest.approx(sum(s["loss"] for s in line["samples"]) / len(line["samples"]))
        gradients = [p.grad.flatten() for p in trainable(transformer).values() if p.grad is not None]
        assert line["grad_norm"] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["5b", "1.5-5b"])
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(2, 2), (3, 1)])
def test_every_step_is_the_mean_over_the_clips_it_has(
    settings: Settings,
    make_cache: MakeCache,
    tiny_models: Callable[[Family], Path],
    metrics: Any,
    family: Family,
    batch_size: int,
    grad_accum: int,
) -> None:
    shards = make_cache(family, CLIPS)
    steps = 6  # two epochs of three steps, or more than one of four
    config = settings(
        shards=shards, steps=steps, batch_size=batch_size, grad_accum=grad_accum, caption_dropout=0.0, lr=1e-9
    )
    lines = metrics(train(config).output)
    by_hand(config, tiny_models(family), lines)
    shapes = {row.id: row.bucket for row in CacheReader(shards).samples}
    used = [{shapes[sample["id"]] for sample in line["samples"]} for line in lines]
    assert all(len(buckets) == 1 for buckets in used)
    assert len(set.union(*used)) == 2
    first = [sample["id"] for line in lines for sample in line["samples"] if line["epoch"] == 0]
    assert sorted(first) == sorted(shapes)
    assert {len(line["samples"]) for line in lines} == ({1, 3, 4} if grad_accum == 2 else {2, 3})


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_goes_on_between_buckets(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any, stop: int
) -> None:
    common = {"shards": make_cache("2b", CLIPS), "batch_size": 2, "grad_accum": 2, "workers": 2}
    whole = train(settings(output=tmp_path / "whole", steps=5, **common))
    config = settings(output=tmp_path / "parts", steps=stop, checkpoint_every=1, **common)
    train(config)
    again = train(config.model_copy(update={"steps": 5, "resume": "latest"}))
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert metrics(again.output) == metrics(whole.output)


def test_two_processes_train_the_same_buckets(
    settings: Settings, make_cache: MakeCache, train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    """And go on from what one process has done."""
    common = {"shards": make_cache("2b", CLIPS), "steps": 6, "eps": 1e-3, "checkpoint_every": 3}
    one = train(settings(output=tmp_path / "one", batch_size=4, **common))
    two = settings(output=tmp_path / "two", batch_size=1, grad_accum=2, **common)
    train(settings(output=tmp_path / "two", batch_size=4, **{**common, "steps": 3}))
    codes, _ = train_server.run(two.model_copy(update={"resume": "latest"}), processes=2)
    assert codes == [0, 0], train_server.log.read_text()
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(one.output), strict=True):
        assert [s["id"] for s in ours["samples"]] == [s["id"] for s in theirs["samples"]]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    first, second = load_file(one.lora), load_file(tmp_path / "two" / one.lora.name)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-6)


def test_held_out_clips_may_be_of_any_bucket(
    settings: Settings, make_cache: MakeCache, tmp_path: Path
) -> None:
    (tmp_path / "held-out.txt").write_text("clip-000.mp4\nclip-007.mp4\n")
    config = settings(
        shards=make_cache("2b", CLIPS), steps=1, batch_size=2, workers=1, validate_every=1,
        holdout=str(tmp_path / "held-out.txt"),
    )  # fmt: skip
    lines = (train(config).output / "metrics.jsonl").read_text().splitlines()
    (found,) = [value["validation"] for value in map(json.loads, lines) if "validation" in value]
    assert found["clips"] == 2


def test_sample_videos_have_the_size_of_their_pictures(
    make_cache: MakeCache, tiny_models: Callable[[Family], Path]
) -> None:
    clips = [(9, Size(64, 96)), *[(17, Size(96, 64))] * 3]
    for family, size in (("1.5-5b-i2v", Size(64, 96)), ("1.5-5b", Size(96, 64))):
        reader = CacheReader(make_cache(family, clips, prompts=1))
        variant = read_variant(tiny_models(family))
        provenance = provenance_of("model", variant, reader.manifest, reader.samples)
        assert (provenance.frames, provenance.size) == (17, "96x64")
        assert VideoShape.of(provenance, variant, reader) == VideoShape(17, size, 8.0)
