"""Videos from base model and LoRA, against the stock pipeline driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from stock_frames import stock

from cogcache.config import InferConfig
from cogcache.config_io import load_config
from cogcache.errors import ConfigError
from cogcache.geometry import Size
from cogcache.infer import infer
from cogcache.infer.pipeline import load_pipeline
from cogcache.infer.plan import plan_inference
from cogcache.infer.run import _generate
from cogcache.progress import Progress
from cogcache.tiny import Family

Models = Callable[[Family], Path]
MakeLora = Callable[..., Path]


def video(**settings: Any) -> np.ndarray:
    """The frames that ``infer`` would write for its last prompt, before compression."""
    config = InferConfig(**{"prompt": ["a rabbit"], "steps": 2, "seed": 5, **settings})
    plan = plan_inference(config)
    number = len(plan.prompts) - 1
    with Progress("test", config.steps, "steps") as progress:
        return _generate(load_pipeline(plan), plan, plan.prompts[-1], number, progress)


def stock_video(root: Path, frames: int, size: Size, lora: Path | None = None) -> np.ndarray:
    return stock(CogVideoXPipeline.from_pretrained(root), size, lora, num_frames=frames)


@pytest.mark.parametrize("family", ["2b", "5b", "1.5-5b"])
def test_equals_the_stock_pipeline_with_the_lora(
    tiny_models: Models, make_lora: MakeLora, family: Family
) -> None:
    """Frames and size come from the LoRA file, and are not the model's own."""
    root, lora = tiny_models(family), make_lora(family)
    mine = video(lora=lora)
    assert mine.shape == (9, 32, 48, 3)
    assert np.array_equal(mine, stock_video(root, 9, Size(32, 48), lora))
    assert not np.array_equal(mine, stock_video(root, 9, Size(32, 48)))


def test_scale_zero_is_the_base_model_and_scale_multiplies_alpha(
    tiny_models: Models, make_lora: MakeLora
) -> None:
    lora, base = make_lora(), stock_video(tiny_models("2b"), 9, Size(32, 48))
    assert np.array_equal(video(lora=lora, lora_scale=0.0), base)
    assert np.array_equal(video(lora=lora, lora_scale=0.0, fuse=True), base)
    double = make_lora(alpha=4, name="double.safetensors")
    assert np.array_equal(video(lora=lora, lora_scale=2.0), video(lora=double))


def test_fusing_changes_nothing_but_rounding(make_lora: MakeLora) -> None:
    lora = make_lora()
    apart, fused = (video(lora=lora, lora_scale=1.5, fuse=fuse).astype(int) for fuse in (False, True))
    assert np.abs(apart - fused).max() <= 1


def test_bfloat16_keeps_scale_zero_exact(make_lora: MakeLora) -> None:
    lora = make_lora()
    base = video(
        model=str(plan_inference(InferConfig(lora=lora, prompt=["x"])).model),
        frames=9,
        size="32x48",
        dtype="bfloat16",
    )
    assert np.array_equal(video(lora=lora, lora_scale=0.0, dtype="bfloat16"), base)


def test_each_prompt_has_its_own_seed(tiny_models: Models) -> None:
    settings = {"model": str(tiny_models("2b")), "frames": 9, "size": "32x48"}
    second = video(prompt=["a cat", "a rabbit"], seed=4, **settings)
    assert np.array_equal(second, video(prompt=["a rabbit"], seed=5, **settings))
    assert not np.array_equal(second, video(prompt=["a rabbit"], seed=4, **settings))


@pytest.mark.parametrize(
    ("choice", "kind"),
    [("auto", CogVideoXDDIMScheduler), ("ddim", CogVideoXDDIMScheduler), ("dpm", CogVideoXDPMScheduler)],
)
def test_scheduler_keeps_the_familys_facts(tiny_models: Models, choice: str, kind: type) -> None:
    config = InferConfig(model=str(tiny_models("5b")), prompt=["x"], scheduler=choice)
    scheduler = load_pipeline(plan_inference(config)).scheduler
    assert type(scheduler) is kind
    facts = ("snr_shift_scale", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    assert [scheduler.config[name] for name in facts] == [1.0, "v_prediction", "trailing", True]


def test_writes_videos_and_settings_that_repeat_them(make_lora: MakeLora, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  a dog\r\n".encode())
    out = tmp_path / "new" / "clip.mp4"
    paths = infer(InferConfig(lora=make_lora(), prompts_file=tmp_path / "prompts.txt", output=out, steps=1))
    assert [path.name for path in paths] == ["clip-000.mp4", "clip-001.mp4"]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "clip-000.mp4",
        "clip-001.mp4",
        "clip.config.yaml",
    ]
    with av.open(str(paths[1])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (9, 48, 32, 12)

    before = [path.read_bytes() for path in paths]
    repeat = load_config(InferConfig, {}, out.with_name("clip.config.yaml"))
    assert (repeat.prompt, repeat.frames, repeat.size, repeat.fps) == (["a cat", "a dog"], 9, "32x48", 12.0)
    with pytest.raises(ConfigError, match=r"clip-000\.mp4 is already there"):
        infer(repeat)
    assert [path.read_bytes() for path in infer(repeat.model_copy(update={"overwrite": True}))] == before


def test_base_model_alone_takes_its_own_defaults(tiny_models: Models) -> None:
    plan = plan_inference(InferConfig(model=str(tiny_models("1.5-5b")), prompt=["x"]))
    assert (plan.frames, str(plan.size), plan.fps, plan.dtype) == (17, "64x96", 16.0, "float32")
    assert plan.outputs == (Path("output.mp4"),)
