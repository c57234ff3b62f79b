"""Image-to-video and video-to-video, against the stock pipelines driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from making_videos import numbers, picture, write_video
from PIL import Image
from stock_frames import stock

from cogcache.config import InferConfig
from cogcache.errors import CogcacheError, ConfigError, GeometryError
from cogcache.geometry import Size
from cogcache.infer import infer
from cogcache.infer.conditions import pipeline_inputs
from cogcache.infer.pipeline import load_pipeline
from cogcache.infer.plan import Plan, plan_inference
from cogcache.infer.run import _generate
from cogcache.pictures import load_picture
from cogcache.progress import Progress
from cogcache.tiny import Family

Models = Callable[[Family], Path]
MakeLora = Callable[..., Path]
SMALL = {"frames": 9, "size": "32x48"}


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 60x80 whose EXIF says that it lies on its side: upright it is 80x60."""
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 numbered frames of 96x160 at 24 fps."""
    return write_video(tmp_path_factory.mktemp("source") / "source.mp4", frames=30)


def planned(**settings: Any) -> Plan:
    return plan_inference(InferConfig(**{"prompt": ["a rabbit"], "steps": 2, "seed": 5, **settings}))


def video(**settings: Any) -> np.ndarray:
    """The frames that ``infer`` would write for its last prompt, before compression."""
    plan = planned(**settings)
    number = len(plan.prompts) - 1
    with Progress("test", plan.steps, "steps") as progress:
        return _generate(load_pipeline(plan), plan, plan.prompts[-1], number, progress)


@pytest.mark.parametrize(
    ("family", "frames", "size"),
    [("5b-i2v", 17, Size(64, 96)), ("1.5-5b-i2v", 9, Size(32, 48))],
)
def test_image_to_video_equals_the_stock_pipeline(
    tiny_models: Models, make_lora: MakeLora, photo: Path, family: Family, frames: int, size: Size
) -> None:
    """The picture is turned upright, filled and cropped here as the encode stage does it."""
    root, lora = tiny_models(family), make_lora(family, frames=frames, size=str(size))
    mine = video(lora=lora, image=[photo], tiling=False)
    image = Image.fromarray(load_picture(photo, size).numpy())
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(root)
    assert np.array_equal(mine, stock(pipe, size, lora, image=image, num_frames=frames))
    assert mine.shape == (frames, size.height, size.width, 3)


def test_the_first_frame_is_encoded_whole_even_where_decoding_is_tiled(
    tiny_models: Models, photo: Path
) -> None:
    """As for training. The tiny VAE's tiles are 48x80."""
    pipe = load_pipeline(planned(model=str(tiny_models("5b-i2v")), image=[photo]))
    assert pipe.vae.use_tiling
    pixels = torch.randn((1, 3, 1, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = pipe.vae.encode(pixels).latent_dist.mean
        assert pipe.vae.use_tiling
        whole = CogVideoXImageToVideoPipeline.from_pretrained(tiny_models("5b-i2v")).vae.encode(pixels)
        tiled = type(pipe.vae).encode(pipe.vae, pixels).latent_dist.mean
    assert torch.equal(mine, whole.latent_dist.mean)
    assert not torch.equal(mine, tiled)


@pytest.mark.parametrize("family", ["2b", "5b"])
def test_video_to_video_equals_the_stock_pipeline(
    tiny_models: Models, make_lora: MakeLora, source: Path, family: Family
) -> None:
    lora = make_lora(family)  # says 12 fps: every other frame of the source
    settings = {"lora": lora, "video": [source], "steps": 4, "strength": 0.6}
    frames = pipeline_inputs(planned(**settings), 0)["video"]
    pipe = CogVideoXVideoToVideoPipeline.from_pretrained(tiny_models(family))
    expected = stock(pipe, Size(32, 48), lora, steps=4, video=frames, strength=0.6)
    assert expected.shape == (9, 32, 48, 3)
    assert np.array_equal(video(**settings), expected)
    assert not np.array_equal(video(**{**settings, "strength": 0.9}), expected)


def test_the_source_is_picked_by_its_timestamps_and_fitted(tiny_models: Models, source: Path) -> None:
    settings = {"model": str(tiny_models("2b")), "video": [source], "frames": 9, "size": "96x160"}
    frames = pipeline_inputs(planned(**settings, fps=8.0), 0)["video"]
    assert numbers(np.stack([np.asarray(frame) for frame in frames])) == [3 * n for n in range(9)]
    small = pipeline_inputs(planned(**{**settings, "size": "32x48"}), 0)["video"]
    assert {frame.size for frame in small} == {(48, 32)}


@pytest.mark.parametrize("family", ["5b", "1.5-5b"])
def test_at_full_strength_nothing_of_the_source_is_left(
    tiny_models: Models, source: Path, family: Family
) -> None:
    """The noise schedule ends in pure noise: what is left is the stock text-to-video pipeline with that noise.

    For 1.5, whose stock video-to-video pipeline refuses such clips, this fails if the padding is appended, is not
    dropped before decoding, or the frame counts are off.
    """
    root = tiny_models(family)
    settings = {"model": str(root), "video": [source], "strength": 1.0, **SMALL}
    mine = video(**settings)
    pipe = CogVideoXPipeline.from_pretrained(root)
    generator = torch.Generator().manual_seed(5)
    latent_frames = 4 if family == "1.5-5b" else 3
    torch.randn((1, 16, 3, 4, 6), generator=generator)  # the draw from the VAE's posterior
    noise = torch.randn((1, latent_frames, 16, 4, 6), generator=generator)
    expected = stock(pipe, Size(32, 48), num_frames=9, latents=noise)
    assert np.array_equal(mine, expected)


def test_video_to_video_of_1_5_begins_with_the_padded_and_noised_source(
    tiny_models: Models, source: Path
) -> None:
    """The model's first input: the scaled latent, a copy of its first frame in front, noised to the timestep."""
    settings = {"model": str(tiny_models("1.5-5b")), "video": [source], "steps": 2, "strength": 0.5, **SMALL}
    plan = planned(**settings)
    pipe = load_pipeline(plan)
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named), with_kwargs=True
    )
    with Progress("test", 1, "steps") as progress:
        assert len(_generate(pipe, plan, "a rabbit", 0, progress)) == 9
    (named,) = seen  # half of two steps
    generator = torch.Generator().manual_seed(5)
    pixels = pipe.video_processor.preprocess_video(pipeline_inputs(plan, 0)["video"], 32, 48)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample(generator).transpose(1, 2)
    scaled = latents * pipe.vae.config.scaling_factor
    padded = torch.cat([scaled[:, :1], scaled], 1)
    noise = torch.randn(padded.shape, generator=generator)
    expected = pipe.scheduler.add_noise(padded, noise, named["timestep"][:1])
    assert torch.equal(named["hidden_states"][:1], expected)


def test_lists_are_matched_and_relative_to_their_folder(
    tiny_models: Models, photo: Path, tmp_path: Path
) -> None:
    root = str(tiny_models("1.5-5b-i2v"))
    (tmp_path / "pictures").mkdir()
    for n in range(2):
        Image.fromarray(picture(n)).save(tmp_path / "pictures" / f"{n}.png")
    (tmp_path / "images.txt").write_text("pictures/0.png\npictures/1.png\n")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\n")
    lists = {"prompt": [], "prompts_file": tmp_path / "prompts.txt", "images_file": tmp_path / "images.txt"}
    out = tmp_path / "out" / "clip.mp4"
    settings = {"model": root, "output": out, "steps": 1, **SMALL}
    assert len(infer(InferConfig(**settings, **lists))) == 2
    plan = planned(**settings, **lists)
    assert [path.name for path in plan.inputs.images] == ["0.png", "1.png"]
    assert plan.config.images_file is None
    for_all = planned(**settings, prompt=["a", "b"], image=[photo])
    assert for_all.inputs.images == (photo, photo)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    with pytest.raises(ConfigError, match=r"prompts\.txt.*line 2 is blank"):
        planned(**settings, **lists)


REFUSED: dict[str, tuple[Family, dict[str, Any], type[CogcacheError], str]] = {
    "no image": ("5b-i2v", {}, ConfigError, "needs a first frame.*--image"),
    "image for text-to-video": ("5b", {"image": ["PHOTO"]}, ConfigError, "takes no --image"),
    "video for image-to-video": ("5b-i2v", {"video": ["SOURCE"]}, ConfigError, "takes no --video"),
    "two images, three prompts": (
        "5b-i2v", {"image": ["PHOTO"] * 2, "prompt": ["a"] * 3}, ConfigError, "2 images are given for 3 prompts",
    ),
    "missing image": ("5b-i2v", {"image": ["nowhere.png"]}, ConfigError, "no image 'nowhere.png'"),
    "size of a fixed grid": ("5b-i2v", {"image": ["PHOTO"], "size": "32x48"}, GeometryError, "only size .*64x96"),
    "frames of a fixed grid": ("5b-i2v", {"image": ["PHOTO"], "frames": 9}, GeometryError, "only count allowed is 17"),
    "not an image": ("5b-i2v", {"image": ["SOURCE"]}, ConfigError, "source.mp4.*cannot be read"),
    "not a video": ("5b", {"video": ["PHOTO"], **SMALL}, ConfigError, "photo.jpg"),
    "short video": ("5b", {"video": ["SOURCE"], "frames": 17}, ConfigError, "10 < 17 frames.*--fps"),
    "no step left": ("5b", {"video": ["SOURCE"], "strength": 0.1, **SMALL}, ConfigError, "no step"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(
    tiny_models: Models, photo: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All before the model is loaded."""
    monkeypatch.setattr("cogcache.infer.pipeline.load_pipeline", lambda _plan: pytest.fail("too late"))
    family, settings, error, text = REFUSED[name]
    places = {"PHOTO": photo, "SOURCE": source}
    settings = {
        key: [places.get(item, item) for item in value] if key in ("image", "video") else value
        for key, value in settings.items()
    }
    values = {"prompt": ["x"], "model": str(tiny_models(family)), "output": tmp_path / "x.mp4", "steps": 2}
    with pytest.raises(error, match=text):
        infer(InferConfig(**{**values, **settings}))
