"""Validation in the middle of a training: what it measures, and that training does not notice it.

Mutations tried, each caught: draws by the run's seed; another draw of the image bank; held-out clips trained on; mode
not put back; random state not put back; every process samples every prompt; losses dealt in another order; validation
forgotten after a kill; reported although stopped; alike videos for all prompts.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.draws import generator
from cogcache.errors import ConfigError, MismatchError, ModelError, StoppedError
from cogcache.geometry import Size
from cogcache.mp4 import read_mp4
from cogcache.tiny import Family
from cogcache.train import train, validation
from cogcache.train.holdout import split_holdout
from cogcache.train.model import load_scheduler, load_transformer
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.train.validation import Validator, fixed_timesteps

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]
MakeCache = Callable[..., Path]
CLIPS = [(9, Size(32, 48))] * 4
FAST = {"sample_steps": 2}


def validations(output: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


def training_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "validation" not in line]


def videos(output: Path, steps: str = "*") -> dict[str, Any]:
    """Frames of every sample video, as floats."""
    files = sorted(output.glob(f"samples/step-{steps}/*.mp4"))
    return {str(path.relative_to(output)): read_mp4(path)[0].astype(float) for path in files}


def assert_same_videos(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Equal frames were written. x264 does not always encode pictures as small as these to the same bytes; videos of
    two prompts differ by 40.
    """
    assert first.keys() == second.keys()
    for name, frames in first.items():
        assert np.abs(frames - second[name]).mean() < 4, name


def test_timesteps_are_spread_evenly() -> None:
    assert fixed_timesteps(1000) == [100, 300, 500, 700, 900]


def test_training_does_not_notice_validation(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA dropout and videos; the random state and the mode are looked at, too."""
    common = {"shards": make_cache("2b", CLIPS, prompts=1), "steps": 4, "holdout": "25%", "lora_dropout": 0.3}
    plain = train(settings(output=tmp_path / "plain", **common))
    run, seen = Validator.run, []

    def watched(self: Validator, *args: Any) -> Any:
        before = torch.get_rng_state()
        result = run(self, *args)
        modes = {module.training for module in self.transformer.modules()}
        seen.append((torch.equal(torch.get_rng_state(), before), modes, torch.is_grad_enabled()))
        return result

    monkeypatch.setattr(Validator, "run", watched)
    often = settings(output=tmp_path / "often", validate_every=1, validate_at_start=True, **common, **FAST)
    validated = train(often)
    assert seen == [(True, {True}, True)] * 5
    assert validated.weights.read_bytes() == plain.weights.read_bytes()
    assert training_lines(metrics(validated.output)) == metrics(plain.output)
    assert sorted(validations(validated.output)) == [0, 1, 2, 3, 4]
    trained = {sample["id"] for line in metrics(plain.output) for sample in line["samples"]}
    assert len(trained) == 3


def test_when_it_validates(settings: Settings, make_cache: MakeCache) -> None:
    """Optimizer steps count, not microbatches; each validation once, by the lines as they are."""
    shards = make_cache("2b", [(9, Size(32, 48))] * 6)
    config = settings(shards=shards, steps=5, grad_accum=2, holdout="17%", validate_every=2)
    output = train(config).output
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "validation" in line) for line in lines] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True),
    ]  # fmt: skip
    found = [line["validation"] for line in lines if "validation" in line]
    assert all(value["clips"] == 1 and value["videos"] == [] for value in found)
    sizes = {len(line["samples"]) for line in training_lines(lines)}
    assert sizes == {1, 2}  # of five clips a step of an epoch has but one


@pytest.mark.parametrize("family", ["1.5-5b", "5b-i2v"])
def test_the_loss_is_that_of_the_objective_at_fixed_draws(
    settings: Settings, make_cache: MakeCache, tiny_models: Models, tmp_path: Path, family: Family
) -> None:
    """Computed anew here from the cache; a LoRA that has not been trained yet changes nothing."""
    shards, root = make_cache(family, [(9, Size(64, 96))] * 3), tiny_models(family)
    (tmp_path / "held-out.txt").write_text("clip-001.mp4\nclip-002.mp4\n")
    found = []
    for seed in (0, 1):
        config = settings(
            shards=shards, output=tmp_path / str(seed), seed=seed, steps=1, holdout=str(tmp_path / "held-out.txt"),
            validate_every=1, validate_at_start=True,
        )  # fmt: skip
        found.append(validations(train(config).output))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]

    reader = CacheReader(shards)
    variant, transformer = reader.manifest.model.variant, load_transformer(root, torch.float32).eval()
    expected: dict[str, list[float]] = {}
    for record in reader.samples[1:]:
        moments = reader.read("latents", record.latents).tensors["moments"][None]
        _, c, f, h, w = moments.shape
        for t in (100, 300, 500, 700, 900):
            padded = padded_frames(f, variant.patch_size_t)
            shapes = {"noise": (1, padded, c // 2, h, w), "posterior": (1, c // 2, f, h, w)}
            draws = {
                name: torch.randn(shape, generator=generator("validation", record.id, t, name))
                for name, shape in shapes.items()
            }
            images = (
                reader.read("images", record.images[0]).tensors["latents"][None] if record.images else None
            )
            with torch.no_grad():
                loss = loss_per_sample(
                    transformer,
                    load_scheduler(root),
                    moments,
                    reader.read("text", record.text).tensors["prompt_embeds"][None],
                    noise_bpchw=draws["noise"],
                    timesteps_b=torch.tensor([t]),
                    variant=variant,
                    posterior_noise_bcfhw=draws["posterior"],
                    image_latents_bcfhw=images,
                )
            expected.setdefault(f"loss_t{t}", []).append(float(loss))
    told = found[0][0]
    for name, losses in expected.items():
        assert told[name] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert told["loss"] == pytest.approx(sum(map(sum, expected.values())) / 10, rel=1e-6)
    assert told["clips"] == 2


def test_videos_and_losses_reach_the_disk_and_tensorboard(settings: Settings, make_cache: MakeCache) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shards = make_cache("1.5-5b-i2v", [(9, Size(64, 96))] * 3, prompts=2)
    config = settings(
        shards=shards, steps=2, holdout="34%", validate_every=1, report_to=["tensorboard"], **FAST
    )
    output = train(config).output
    found = validations(output)
    assert found[2]["videos"] == [
        {"file": f"samples/step-000002/{n:03d}.mp4", "prompt": f"prompt {n}"} for n in (0, 1)
    ]
    files = videos(output)
    assert sorted(files) == [f"samples/step-{s:06d}/{n:03d}.mp4" for s in (1, 2) for n in (0, 1)]
    first, second = (files[f"samples/step-000002/{n:03d}.mp4"] for n in (0, 1))
    assert np.abs(first - second).mean() > 4
    frames, fps = read_mp4(output / "samples/step-000002/001.mp4")
    assert (frames.shape, fps) == ((9, 64, 96, 3), 8.0)

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    for name in ("loss", "loss_t100", "loss_t900"):
        points = {event.step: event.value for event in events.Scalars(f"validation/{name}")}
        assert points == {step: pytest.approx(found[step][name]) for step in (1, 2)}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    shown = events.Images("samples/001")
    assert [event.step for event in shown] == [1, 2]
    gif = Image.open(io.BytesIO(shown[1].encoded_image_string))
    assert (gif.format, gif.n_frames, gif.size) == ("GIF", 9, (96, 64))
    gif.seek(8)
    assert np.abs(np.asarray(gif.convert("RGB"), dtype=float) - frames[8]).mean() < 16  # of 256 colours
    assert gif.info["duration"] == 120
    text = events.Tensors("prompts/001/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"prompt 1"


def test_videos_can_be_left_out(
    settings: Settings, make_cache: MakeCache, tiny_models: Models, tmp_path: Path
) -> None:
    """Then the VAE is not needed; with them its absence is told before anything is loaded."""
    model = shutil.copytree(tiny_models("2b"), tmp_path / "model")
    for file in (model / "vae").glob("*.safetensors"):
        file.unlink()
    common = {
        "shards": make_cache("2b", CLIPS, prompts=1),
        "model": str(model),
        "steps": 1,
        "validate_every": 1,
    }
    with pytest.raises(ModelError, match="which sample videos need"):
        train(settings(**common))
    assert not (tmp_path / "run").exists()
    output = train(settings(**common, holdout="25%", sample_videos=False)).output
    assert not (output / "samples").exists()
    assert validations(output)[1]["videos"] == []


def test_settings_that_do_not_fit_are_refused(
    settings: Settings, make_cache: MakeCache, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing to validate"):
        train(settings(validate_every=1))
    with pytest.raises(ConfigError, match="nothing to validate"):
        train(settings(shards=make_cache("2b", CLIPS, prompts=1), validate_every=1, sample_videos=False))
    with pytest.raises(ValueError, match="--validate-every"):
        settings(validate_at_start=True)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_split(settings: Settings, make_cache: MakeCache, tmp_path: Path) -> None:
    shards = make_cache("2b", CLIPS)
    config = settings(shards=shards, steps=2, holdout="25%", checkpoint_every=1)
    train(config)
    for changes in ({"holdout": None}, {"holdout": "50%"}):
        with pytest.raises(MismatchError) as caught:
            train(config.model_copy(update={"steps": 3, "resume": "latest", **changes}))
        assert list(caught.value.differences) == ["held_out"]
    _, held_out = split_holdout(CacheReader(shards).samples, config)
    listed = tmp_path / "same.txt"
    listed.write_text(held_out[0].source)  # the same split asked for in another way, and now measured
    train(
        config.model_copy(
            update={"steps": 3, "resume": "latest", "holdout": str(listed), "validate_every": 1}
        )
    )
    assert sorted(validations(tmp_path / "run")) == [2, 3]


def test_stopped_runs_end_like_undisturbed_ones(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between checkpoint and validation; stopped by a signal while sampling; in the end all files are equal."""
    common = {
        "shards": make_cache("2b", CLIPS, prompts=2), "steps": 4, "holdout": "25%", "validate_every": 2,
        "checkpoint_every": 2, "resume": "latest", **FAST,
    }  # fmt: skip
    whole = train(settings(output=tmp_path / "whole", **common))
    config = settings(output=tmp_path / "stopped", **common)
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert validations(config.output) == {}
    sample, calls = validation.sample_latents, []

    def interrupted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "sample_latents", interrupted)
        with pytest.raises(StoppedError, match="after step 4 of 4"):
            train(config)
    assert sorted(validations(config.output)) == [2]
    again = train(config)
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert_same_videos(videos(again.output), videos(whole.output))
    assert len(videos(whole.output)) == 4
    assert metrics(again.output) == metrics(whole.output)
    train(config)  # nothing is left to do, and nothing is done twice
    assert metrics(again.output) == metrics(whole.output)


def test_two_processes_share_the_work(
    settings: Settings, make_cache: MakeCache, train_server: Any, tmp_path: Path
) -> None:
    """Each prompt once over all processes, the same videos and losses as of one."""
    common = {
        "shards": make_cache("2b", CLIPS, prompts=3), "steps": 1, "holdout": "50%", "validate_every": 1,
        "validate_at_start": True, **FAST,
    }  # fmt: skip
    one = train(settings(output=tmp_path / "one", grad_accum=2, **common)).output
    two, trace = tmp_path / "two", tmp_path / "trace.txt"
    codes, _ = train_server.run(settings(output=two, **common), processes=2, trace=trace)
    assert codes == [0, 0], train_server.log.read_text()
    sampled = sorted(trace.read_text().splitlines())
    assert sampled == ["0 42", "0 42", "0 44", "0 44", "1 43", "1 43"]  # two validations
    assert_same_videos(videos(two, "000000"), videos(one, "000000"))
    assert sorted(videos(two)) == sorted(videos(one))
    for step, theirs in validations(one).items():
        ours = validations(two)[step]
        assert ours["videos"] == theirs["videos"]
        for name in ("loss", "loss_t100", "loss_t500", "loss_t900"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


LEAN = """
import sys
from pathlib import Path
from cogcache.config import TrainConfig
from cogcache.train import train
train(TrainConfig(shards=Path(sys.argv[1]), output=Path(sys.argv[2]), steps=1, rank=2, device="cpu", holdout="34%",
                  validate_every=1, sample_videos=False))
heavy = ("diffusers.models.autoencoders", "transformers.models.t5", "decord", "av", "cogcache.precompute",
         "cogcache.infer", "cogcache.video", "wandb", "torch.utils.tensorboard")
print("FOUND", [m for m in sys.modules if any(m == h or m.startswith(h + ".") for h in heavy)])
"""


def test_a_validation_loss_needs_no_vae_no_encoder_and_no_video_reader(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    shards = make_cache("1.5-5b-i2v", [(9, Size(64, 96))] * 3, prompts=2)
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(shards), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "FOUND []", done.stdout


def test_a_loss_that_is_not_a_number_is_told_and_stops_nothing(
    settings: Settings, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held-out.txt").write_text("clip-001.mp4\n")
    shards = make_cache("2b", CLIPS, bad=1)
    config = settings(shards=shards, steps=1, holdout=str(tmp_path / "held-out.txt"), validate_every=1)
    assert validations(train(config).output)[1]["loss"] is None
    assert "the loss is not a number" in capsys.readouterr().err
