"""Whole trainings of tiny models.

Mutations tried, each caught: loss divided by the microbatch instead of the step; no factor for data parallelism;
fillers with weight 1; gradients clipped before they are unscaled, or not cleared; LoRA dropout not reseeded; no look at
non-finite losses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.config_io import read_yaml
from cogcache.errors import CacheError, ConfigError, MismatchError, ModelError, NonFiniteError
from cogcache.geometry import Size
from cogcache.lora import read_lora_header
from cogcache.tiny import FAMILIES, Family, build_tiny_model
from cogcache.train import train
from cogcache.train.model import load_transformer
from cogcache.variants import Variant, read_variant

Settings = Callable[..., TrainConfig]
MakeCache = Callable[..., Path]


def assert_near(ours: Path, theirs: Path, rtol: float = 1e-3) -> None:
    """Equal up to the order of float additions."""
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_says_what_it_did(
    settings: Settings, make_cache: MakeCache, metrics: Any, family: Family
) -> None:
    shards = make_cache(family, [(9, Size(64, 96))] * 2)
    result = train(settings(shards=shards, steps=4, batch_size=2, gradient_checkpointing=True))
    lines = metrics(result.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert result.loss == lines[-1]["loss"] == pytest.approx(sum(s["loss"] for s in lines[-1]["samples"]) / 2)
    assert all(0 <= s["t"] <= 999 for line in lines for s in line["samples"])
    header, manifest = read_lora_header(result.lora), CacheReader(shards).manifest
    assert (header.rank, header.alpha) == (2, 1.0)
    assert header.variant == manifest.model.variant
    assert header.fingerprint == manifest.fingerprint()
    assert (header.frames, header.size, header.fps) == (9, "64x96", 8.0)
    assert any(t.abs().max() > 0 for name, t in load_file(result.lora).items() if "lora_B" in name)
    assert read_yaml(result.output / "config.yaml")["rank"] == 2


def test_training_lowers_the_loss_on_one_clip(
    settings: Settings, make_cache: MakeCache, metrics: Any
) -> None:
    """The clip's moments are fixed, so a LoRA can learn its mean; timesteps of early and late steps differ."""
    shards = make_cache("2b", [(9, Size(32, 32))])
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    result = train(settings(shards=shards, steps=40, rank=16, alpha=16, target_modules=targets))
    losses = [line["loss"] for line in metrics(result.output)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_workers_and_checkpointing_change_nothing(settings: Settings, tmp_path: Path) -> None:
    contents = set()
    for number, changes in enumerate(
        [{"workers": 0}, {"workers": 1}, {"workers": 3}, {"gradient_checkpointing": True}]
    ):
        config = settings(output=tmp_path / str(number), steps=4, lora_dropout=0.2, **changes)
        contents.add(train(config).lora.read_bytes())
    assert len(contents) == 1


def test_another_seed_is_another_run(settings: Settings, tmp_path: Path) -> None:
    first = train(settings(output=tmp_path / "1", seed=1, steps=2))
    second = train(settings(output=tmp_path / "2", seed=2, steps=2))
    assert first.lora.read_bytes() != second.lora.read_bytes()


def test_accumulation_equals_a_bigger_batch_in_partial_batches_too(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any
) -> None:
    shards = make_cache("2b", [(9, Size(32, 48))] * 5 + [(9, Size(32, 32))] * 3)
    runs = []
    for number, (batch_size, grad_accum) in enumerate([(4, 1), (2, 2), (1, 4)]):
        config = settings(
            shards=shards, output=tmp_path / str(number), steps=6, eps=1e-3, max_grad_norm=1e-3,
            batch_size=batch_size, grad_accum=grad_accum,
        )  # fmt: skip
        runs.append(train(config))
    whole = metrics(runs[0].output)
    assert {len(line["samples"]) for line in whole} == {1, 3, 4}
    for run in runs[1:]:
        assert_near(run.lora, runs[0].lora)
        for ours, theirs in zip(metrics(run.output), whole, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_two_processes_equal_one(
    settings: Settings, make_cache: MakeCache, train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    """With a process that has only a filler in some steps."""
    shards = make_cache("2b", [(9, Size(32, 48))] * 5)
    common = {"shards": shards, "steps": 4, "batch_size": 1, "eps": 1e-3, "checkpoint_every": 2}
    one = train(settings(output=tmp_path / "one", grad_accum=4, **common))
    two = settings(output=tmp_path / "two", grad_accum=2, **common)
    codes, _ = train_server.run(two, processes=2)
    assert codes == [0, 0], train_server.log.read_text()
    assert {len(line["samples"]) for line in metrics(one.output)} == {1, 4}
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(one.output), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert [s["id"] for s in ours["samples"]] == [s["id"] for s in theirs["samples"]]
    assert_near(tmp_path / "two" / one.lora.name, one.lora)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_bases_train_and_resume_exactly(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any, dtype: str
) -> None:
    model = build_tiny_model(tmp_path / "model", "2b", dtype=dtype)
    common = {"shards": make_cache("2b"), "model": str(model), "steps": 4}
    whole = train(settings(output=tmp_path / "whole", **common))
    half = settings(output=tmp_path / "half", checkpoint_every=2, **{**common, "steps": 2})
    train(half)
    state = json.loads((tmp_path / "half" / "checkpoint-000002" / "trainer_state.json").read_text())
    assert bool(state["scaler"]) == (dtype == "float16")
    resumed = train(half.model_copy(update={"steps": 4, "resume": "latest"}))
    assert resumed.lora.read_bytes() == whole.lora.read_bytes()
    assert all(0 < line["loss"] < 10 for line in metrics(whole.output))
    assert {t.dtype for t in load_file(whole.lora).values()} == {torch.float32}


def test_float16_gradients_are_unscaled_before_clipping(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any
) -> None:
    model = build_tiny_model(tmp_path / "model", "2b", dtype="float16")
    norms = []
    for dtype in ("float16", "float32"):
        config = settings(
            shards=make_cache("2b"), model=str(model), output=tmp_path / dtype, dtype=dtype, steps=1
        )
        norms.append(metrics(train(config).output)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The transformers that runs load, as they leave them."""
    from cogcache.train.memory import place

    loaded: list[torch.nn.Module] = []

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        loaded.append(load_transformer(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(place, "load_transformer", load)
    return loaded


def test_the_base_stays_as_it_was(
    settings: Settings, tiny_models: Callable[[Family], Path], kept: list[torch.nn.Module]
) -> None:
    train(settings(steps=2))
    before = load_transformer(tiny_models("5b"), torch.float32).state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in kept[0].state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_lora_acts_in_the_stock_pipeline_as_it_did_in_training(
    settings: Settings, tiny_models: Callable[[Family], Path], kept: list[torch.nn.Module]
) -> None:
    from diffusers import CogVideoXPipeline

    result = train(settings(steps=3, rank=4, alpha=2.0))
    pipe = CogVideoXPipeline.from_pretrained(tiny_models("5b"))
    for (
        tensor
    ) in pipe.transformer.parameters():  # products round differently where weights begin at another address
        tensor.data = tensor.data.clone()
    inputs = {
        "hidden_states": torch.randn(1, 3, 16, 4, 6),
        "encoder_hidden_states": torch.randn(1, 226, 32),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(32, 48, 3, torch.device("cpu")),
        "return_dict": False,
    }
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(result.lora)
        stock, trained = pipe.transformer(**inputs)[0], kept[0].eval()(**inputs)[0]
    assert not torch.equal(stock, plain)
    assert torch.equal(stock, trained)


@pytest.mark.parametrize("steps", [3])
def test_a_non_finite_loss_stops_before_the_update_and_names_the_sample(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any, steps: int
) -> None:
    shards = make_cache("5b", [(9, Size(32, 48))] * 3, bad=1)
    config = settings(shards=shards, steps=steps, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"clip-001 \(clip-001.mp4\)") as caught:
        train(config)
    assert caught.value.exit_code == 4
    done = len(metrics(config.output))
    assert done < steps
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == done
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_log_every_and_tensorboard(settings: Settings, metrics: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(settings(steps=5, log_every=2, report_to=["tensorboard"]))
    assert [line["step"] for line in metrics(result.output)] == [2, 4, 5]
    events = EventAccumulator(str(result.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 5]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(result.loss)


def test_a_missing_tracker_package_is_named(settings: Settings, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--report-to wandb needs a package") as caught:
        train(settings(report_to=["wandb"]))
    assert caught.value.hint == "Run: pip install wandb"


def test_another_model_is_refused_field_by_field(
    settings: Settings, tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError) as caught:
        train(settings(model=str(tiny_models("2b"))))
    assert caught.value.differences["scaling_factor"] == (0.7, 1.15258426)
    with pytest.raises(ModelError, match="there is no model folder"):
        train(settings(model=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


FACTS: dict[str, tuple[str, dict[str, Any], object]] = {
    "in_channels": ("transformer", {"in_channels": 32, "out_channels": 16}, 32),
    "latent_channels": ("transformer", {"out_channels": 8}, 8),
    "num_layers": ("transformer", {"num_layers": 7}, 7),
    "num_attention_heads": ("transformer", {"num_attention_heads": 9}, 9),
    "attention_head_dim": ("transformer", {"attention_head_dim": 96}, 96),
    "patch_size": ("transformer", {"patch_size": 4}, 4),
    "patch_size_t": ("transformer", {"patch_size_t": 2}, 2),
    "positions": ("transformer", {"use_rotary_positional_embeddings": False}, "sincos"),
    "ofs": ("transformer", {"ofs_embed_dim": 512}, True),
    "sample_frames": ("transformer", {"sample_frames": 25}, 25),
    "sample_height": ("transformer", {"sample_height": 20}, 20),
    "sample_width": ("transformer", {"sample_width": 20}, 20),
    "text_length": ("transformer", {"max_text_seq_length": 224}, 224),
    "text_dim": ("transformer", {"text_embed_dim": 4096}, 4096),
    "spatial_factor": ("vae", {"block_out_channels": [8] * 5}, 16),
    "temporal_factor": ("vae", {"temporal_compression_ratio": 8}, 8),
    "scaling_factor": ("vae", {"scaling_factor": 1.5}, 1.5),
    "invert_scale_latents": ("vae", {"invert_scale_latents": True}, True),
    "snr_shift_scale": ("scheduler", {"snr_shift_scale": 2.5}, 2.5),
    "num_train_timesteps": ("scheduler", {"num_train_timesteps": 500}, 500),
}


@pytest.mark.parametrize("name", Variant.model_fields)
def test_every_fact_that_does_not_fit_the_shards_is_named(
    settings: Settings, tiny_models: Callable[[Family], Path], tmp_path: Path, name: str
) -> None:
    component, changes, value = FACTS[name]
    model = shutil.copytree(tiny_models("5b"), tmp_path / "model")
    file = next((model / component).glob("*config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(MismatchError, match="was encoded for") as caught:
        train(settings(model=str(model)))
    was = getattr(read_variant(tiny_models("5b")), name)
    wanted = {name: (was, value)} | ({"task": ("t2v", "i2v")} if name == "in_channels" else {})
    if name == "latent_channels":
        wanted["task"] = ("t2v", "i2v")  # twice as many go in as come out
    assert caught.value.differences == wanted
    assert f"{name}: was {was!r}, is {value!r}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_model_may_have_moved(
    settings: Settings, tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_models("5b"), tmp_path / "moved")
    shutil.rmtree(moved / "vae" / "nothing", ignore_errors=True)
    (next((moved / "vae").glob("*.safetensors"))).unlink()
    shutil.rmtree(moved / "text_encoder")
    shutil.rmtree(moved / "tokenizer")
    assert train(settings(model=str(moved), steps=1)).loss


def test_unusable_settings_are_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        train(settings(shards=tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="device"):
        train(settings(device="cuda:7"))
    with pytest.raises(ConfigError, match="no layer"):
        train(settings(target_modules=["nothing"]))


LEAN = """
import sys
from pathlib import Path
from cogcache.config import TrainConfig
from cogcache.train import train
train(TrainConfig(shards=Path(sys.argv[1]), output=Path(sys.argv[2]), steps=2, rank=2, device="cpu"))
heavy = ("diffusers.models.autoencoders", "diffusers.pipelines.", "transformers.models.t5", "decord", "av", "cv2",
         "imageio", "cogcache.precompute", "cogcache.video", "cogcache.infer", "wandb", "torch.utils.tensorboard")
found = [m for m in sys.modules if any(m == h.rstrip(".") and not h.endswith(".") or
         m.startswith(h.rstrip(".") + ".") for h in heavy)]
print("FOUND", sorted(m for m in found if m not in ALLOWED))
"""


def test_training_reaches_no_vae_no_text_encoder_no_video_reader(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """The import graph of a real two-step training, image-to-video included, in a process of its own."""
    shards = make_cache("1.5-5b-i2v", [(9, Size(64, 96))])
    script = "ALLOWED = {'diffusers.pipelines.pipeline_utils'}\n" + LEAN
    done = subprocess.run(
        [sys.executable, "-c", script, str(shards), str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "FOUND []", done.stdout
