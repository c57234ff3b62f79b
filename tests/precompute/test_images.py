"""The image-condition bank: its distribution, its identity, and what touches it and what does not.

Mutations tried, each caught: noise alone instead of noise on the picture; sigma without its exponential; one sigma
for all draws; posterior mean instead of a sample; seeds by the draw alone, or by the picture alone; the number of
draws in the fingerprint; a key by the picture's name; the bank dropped before all else is checked; remaking saved among
the settings; pictures that could not be hashed; a bank for text-to-video.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making_videos import picture, write_video
from PIL import Image

from cogcache.cache.format import IMAGES, LATENTS, Entry
from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.config_io import read_yaml
from cogcache.draws import generator
from cogcache.errors import ConfigError, GeometryError, MismatchError
from cogcache.geometry import Size
from cogcache.precompute import encode_all, images, pieces
from cogcache.precompute import settings as settings_module
from cogcache.precompute.images import Draw, ImageSource, make_draw, start_draw
from cogcache.precompute.lane import Lane, Running
from cogcache.precompute.vae import FrozenVae, to_pixels
from cogcache.tiny import Family

SIZE = "64x96"  # the one size of a model with learned positions
Settings = Callable[..., EncodeConfig]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 20 frames with lists, and two pictures that no list names. Read only."""
    root = tmp_path_factory.mktemp("i2v-clips")
    for number in range(3):
        write_video(root / f"{number}.mp4", frames=20, image=lambda n, base=40 * number: picture(base + n))
        Image.fromarray(picture(200 + number)).save(root / f"{number}.png")
    (root / "videos.txt").write_text("0.mp4\n1.mp4\n2.mp4\n")
    (root / "prompts.txt").write_text("one\ntwo\nthree\n")
    return root


@pytest.fixture
def i2v(settings: Settings, clips: Path) -> Callable[..., EncodeConfig]:
    """Encoding the three clips with the 1.5 image-to-video model, three draws a clip."""

    def make(**changes: Any) -> EncodeConfig:
        given = {"family": "1.5-5b-i2v", "data_root": clips, "size": SIZE, "image_draws": 3}
        return settings(**{**given, **changes})

    return make


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, tiny_models: Callable[[Family], Path]
) -> Path:
    """A finished cache of the three clips. Read only."""
    shards = tmp_path_factory.mktemp("finished") / "shards"
    model = str(tiny_models("1.5-5b-i2v"))
    encode_all(
        EncodeConfig(
            data_root=clips, model=model, shards=shards, frames=9, size=SIZE, fps="source", device="cpu",
            image_draws=3,
        )
    )  # fmt: skip
    return shards


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, where the settings of ``i2v`` expect it."""
    return shutil.copytree(finished, tmp_path / "shards")


def files(root: Path, series: str) -> dict[str, bytes]:
    """Shards and indexes of a series."""
    return {path.name: path.read_bytes() for path in sorted((root / series).glob(f"{series}-*"))}


def bank(root: Path) -> list[list[torch.Tensor]]:
    """The draws [C, 1, h, w] of each sample, sorted by source."""
    reader = CacheReader(root)
    rows = sorted(reader.samples, key=lambda row: row.source)
    return [[reader.read(IMAGES, key).tensors["latents"] for key in row.images] for row in rows]


class Echo:
    """A VAE whose mean is the picture itself, and whose posterior has the given log-variance."""

    dtype = torch.float32

    def __init__(self, logvar: float = -30.0) -> None:
        self.logvar = logvar

    def start_pixels(self, pixels: torch.Tensor) -> Running:
        moments = torch.cat([pixels, torch.full_like(pixels, self.logvar)], dim=1)
        return Lane(torch.device("cpu")).download(moments, None)


def entry_of(vae: Any, image: torch.Tensor, picture: ImageSource, number: int | None) -> Entry:
    """One draw of a picture's bank."""
    return start_draw(vae, image, make_draw(picture, number, image), picture, "0" * 32)()


def source(name: str) -> ImageSource:
    return ImageSource(Path(name), None, f"file {name}", name, Size(16, 24))


def test_noise_has_the_published_distribution() -> None:
    """Pixel noise of deviation sigma = exp(N(-3, 0.5)), a sigma of its own for each of 600 draws of 3 pictures."""
    image = torch.full((16, 24, 3), 100, dtype=torch.uint8)
    clean = to_pixels(image[None, None])[0]
    logs, seen = [], set()
    for name in ("a", "b", "c"):
        for draw in range(200):
            entry = entry_of(Echo(), image, source(name), draw)
            noise = entry.tensors["latents"] - clean
            sigma = entry.facts["sigma"]
            assert noise.std().item() == pytest.approx(sigma, rel=0.12)
            assert abs(noise.mean().item()) < 5 * sigma / math.sqrt(noise.numel())
            logs.append(math.log(sigma))
            seen.add(entry.facts["seed"])
    assert len(seen) == 600
    logs_t = torch.tensor(logs)
    assert logs_t.mean().item() == pytest.approx(-3.0, abs=5 * 0.5 / math.sqrt(600))
    assert logs_t.std().item() == pytest.approx(0.5, rel=0.15)
    standard = (logs_t + 3.0) / 0.5
    assert (standard.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.1)


def test_the_posterior_is_sampled_and_an_image_for_validation_is_clean() -> None:
    image = torch.full((16, 24, 3), 100, dtype=torch.uint8)
    clean = to_pixels(image[None, None])[0]
    spread = entry_of(Echo(logvar=0.0), image, source("a"), None)
    assert (spread.tensors["latents"] - clean).std().item() == pytest.approx(1.0, rel=0.1)
    assert (spread.facts["sigma"], spread.facts["draw"]) == (0.0, None)
    exact = entry_of(Echo(), image, source("a"), None)
    torch.testing.assert_close(exact.tensors["latents"], clean, rtol=0, atol=1e-5)


def test_a_draw_can_be_made_again_from_what_is_recorded(finished: Path, i2v: Settings, clips: Path) -> None:
    """Seed and sigma in the facts, the picked frame and the stock VAE give the stored latent."""
    from diffusers import AutoencoderKLCogVideoX

    from cogcache.geometry import parse_size
    from cogcache.video import ClipRequest, load_clip

    vae = AutoencoderKLCogVideoX.from_pretrained(Path(i2v().model) / "vae")
    reader = CacheReader(finished)
    (row,) = [row for row in reader.samples if row.source == "1.mp4"]
    frame = load_clip(clips / "1.mp4", ClipRequest(9, parse_size(SIZE))).frames[0]
    for number, key in enumerate(row.images):
        entry = reader.read(IMAGES, key)
        random = torch.Generator().manual_seed(entry.facts["seed"])
        sigma = math.exp(-3 + 0.5 * torch.randn((), generator=random).item())
        pixels = to_pixels(frame[None, None])
        pixels = pixels + sigma * torch.randn(pixels.shape, generator=random)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample(random)[0]
        assert (entry.facts["draw"], entry.facts["source"]) == (number, "1.mp4")
        assert entry.facts["sigma"] == pytest.approx(sigma)
        assert entry.tensors["latents"].shape == (16, 1, 8, 12)
        torch.testing.assert_close(entry.tensors["latents"], latents, rtol=1e-4, atol=1e-4)


def test_every_draw_of_every_clip_is_another(finished: Path) -> None:
    draws = [draw for rows in bank(finished) for draw in rows]
    assert len(draws) == 9
    assert len({draw.numpy().tobytes() for draw in draws}) == 9
    keys = [key for row in CacheReader(finished).samples for key in row.images]
    seeds = {CacheReader(finished).read(IMAGES, key).facts["seed"] for key in keys}
    assert len(seeds) == 9


def test_an_enlarged_bank_begins_with_the_old_one_and_touches_no_latent(copied: Path, i2v: Settings) -> None:
    before = {series: files(copied, series) for series in (LATENTS, IMAGES)}
    old = bank(copied)
    result = encode_all(i2v(image_draws=5))
    assert (result.encoded, result.captions, result.images) == (0, 0, 6)
    assert files(copied, LATENTS) == before[LATENTS]
    assert before[IMAGES].items() < files(copied, IMAGES).items()
    for rows, more in zip(old, bank(copied), strict=True):
        assert len(more) == 5
        assert all(torch.equal(a, b) for a, b in zip(rows, more, strict=False))
    fewer = encode_all(i2v(image_draws=2))
    assert fewer.images == 0
    assert [len(rows) for rows in bank(copied)] == [2, 2, 2]


def test_a_remade_bank_is_the_same_and_nothing_else_is_touched(
    copied: Path, i2v: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(copied, LATENTS) | files(copied, "text") | files(copied, IMAGES)
    result = encode_all(i2v(remake_images=True))
    assert (result.encoded, result.captions, result.images) == (0, 0, 9)
    assert files(copied, LATENTS) | files(copied, "text") | files(copied, IMAGES) == before
    saved = read_yaml(copied / "encode.config.yaml")
    assert saved["remake_images"] is False  # or using the file again would remake again
    monkeypatch.setattr(settings_module, "SIGMA_LOG_MEAN", -2.0)
    monkeypatch.setattr(images, "SIGMA_LOG_MEAN", -2.0)
    with pytest.raises(MismatchError, match=r"series.images.sigma_log_mean: was -3.0, is -2.0"):
        encode_all(i2v())
    old = bank(copied)
    assert encode_all(i2v(remake_images=True)).images == 9
    assert not torch.equal(old[0][0], bank(copied)[0][0])
    assert files(copied, LATENTS).items() <= before.items()


def test_a_bank_is_only_dropped_where_the_rest_fits(copied: Path, i2v: Settings) -> None:
    before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=r"series\.latents\.fps"):
        encode_all(i2v(remake_images=True, fps="8"))
    with pytest.raises(MismatchError, match=r"model\."):
        encode_all(i2v(remake_images=True, family="5b-i2v", frames=17))
    assert {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_dropped_bank_is_missed_until_it_is_back(copied: Path, i2v: Settings) -> None:
    """A bank that is lost (a kill between dropping and committing) is made again by any next run."""
    shutil.rmtree(copied / IMAGES)
    (copied / "manifest.json").unlink()
    assert encode_all(i2v()).images == 9
    assert [len(rows) for rows in bank(copied)] == [3, 3, 3]


def with_images(clips: Path, target: Path, listed: list[str]) -> Path:
    root = shutil.copytree(clips, target)
    (root / "images.txt").write_text("".join(f"{name}\n" for name in listed))
    return root


def test_listed_images_replace_first_frames_and_a_changed_one_is_encoded_anew_alone(
    copied: Path, i2v: Settings, clips: Path, tmp_path: Path
) -> None:
    """The cache of first frames takes up the images: new draws, the same latents. One image serves two clips."""
    root = with_images(clips, tmp_path / "clips", ["0.png", "1.png", "1.png"])
    latents, old = files(copied, LATENTS), bank(copied)
    assert encode_all(i2v(data_root=root)).images == 6
    assert files(copied, LATENTS) == latents
    first = bank(copied)
    assert not torch.equal(first[0][0], old[0][0])
    assert torch.equal(first[1][0], first[2][0])
    Image.fromarray(picture(77)).save(root / "0.png")
    result = encode_all(i2v(data_root=root))
    assert (result.encoded, result.images) == (0, 3)
    second = bank(copied)
    assert not torch.equal(second[0][0], first[0][0])
    assert torch.equal(second[1][0], first[1][0])
    Image.open(root / "1.png").save(root / "other name.png")  # equal content under another name
    (root / "images.txt").write_text("0.png\nother name.png\n1.png\n")
    assert encode_all(i2v(data_root=root)).images == 0


def test_an_image_equal_to_the_first_frame_gives_the_distribution_of_the_first_frame(
    i2v: Settings, clips: Path, tmp_path: Path
) -> None:
    """The fitted picture is what counts: a PNG and a video frame of the same pixels go the same way."""
    from cogcache.precompute.settings import decide
    from cogcache.video import ClipRequest

    values = decide(i2v())
    frame = picture(40)
    Image.fromarray(frame).save(tmp_path / "same.png")
    by_file = ImageSource.of_file(tmp_path / "same.png", "same.png", values.main.size).load(values)
    by_clip = ImageSource.of_clip(clips / "1.mp4", ClipRequest(9, values.main.size), "0", "1.mp4").load(
        values
    )
    assert by_file.shape == by_clip.shape == (64, 96, 3)
    assert (by_file.float() - by_clip.float()).abs().mean() < 4  # H.264's own loss


def test_image_column_of_metadata(i2v: Settings, clips: Path, tmp_path: Path) -> None:
    root = tmp_path / "clips"
    root.mkdir()
    for name in ("0.mp4", "1.mp4", "1.png"):
        shutil.copy(clips / name, root)
    (root / "metadata.jsonl").write_text(
        '{"file_name": "0.mp4", "text": "one"}\n{"file_name": "1.mp4", "text": "two", "image": "1.png"}\n'
    )
    result = encode_all(i2v(data_root=root, image_draws=1))
    reader = CacheReader(result.shards)
    said = {row.source: reader.read(IMAGES, row.images[0]).facts for row in reader.samples}
    assert said["0.mp4"]["image"].startswith("clip ")
    assert (said["1.mp4"]["image"].split()[0], said["1.mp4"]["source"]) == ("file", "1.png")


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b"no image"), lambda p: p.write_bytes(p.read_bytes()[:200])]
)
def test_a_damaged_image_fails_its_clip_alone(
    i2v: Settings, clips: Path, tmp_path: Path, capsys: Any, damage: Callable[[Path], object]
) -> None:
    root = with_images(clips, tmp_path / "clips", ["0.png", "1.png", "2.png"])
    good = (root / "1.png").read_bytes()
    damage(root / "1.png")
    config = i2v(data_root=root, image_draws=2)
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in config.model_dump(mode="json", exclude_unset=True).items()
    ]
    assert run(["encode", *flags]) == 3
    said = capsys.readouterr().err
    assert "2 clips ready, 1 failed" in said
    assert ", 4 image conditions." in said
    assert "the image cannot be read" in said
    (failure,) = CacheReader(config.shards).failures
    assert failure.source == "1.mp4"
    assert [row.source for row in CacheReader(config.shards).samples] != []
    (root / "1.png").write_bytes(good)
    result = encode_all(config)
    assert (result.encoded, result.images, result.failures) == (0, 2, [])


def test_an_image_that_cannot_be_opened_has_no_key_of_its_own(i2v: Settings) -> None:
    from cogcache.errors import VideoError
    from cogcache.precompute.settings import decide

    lost = ImageSource.of_file(Path("/proc/self/mem"), "mem", Size(16, 16))
    with pytest.raises(VideoError, match="could not be read"):
        lost.load(decide(i2v()))


def test_pictures_of_any_kind(tmp_path: Path) -> None:
    """16-bit grey keeps its brightness, EXIF turns the picture, and a bad header is told, not raised."""
    from cogcache.errors import VideoError
    from cogcache.pictures import load_picture

    ramp = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = load_picture(tmp_path / "deep.png", Size(64, 96)).numpy()
    assert np.abs(deep[:, :, 0] - ramp / 257).max() <= 1
    turned = Image.Exif()
    turned[0x112] = 6  # a quarter turn clockwise
    Image.fromarray(picture(5)).save(tmp_path / "turned.png", exif=turned)
    upright = load_picture(tmp_path / "turned.png", Size(160, 96)).numpy()
    assert np.array_equal(upright, np.rot90(picture(5), -1))
    (tmp_path / "bad.ppm").write_bytes(b"P6\n4x 4\n255\n" + bytes(48))
    with pytest.raises(VideoError, match="the image cannot be read"):
        load_picture(tmp_path / "bad.ppm", Size(16, 16))


def test_text_to_video_has_no_bank(
    settings: Settings, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = encode_all(settings("5b", data_root=clips))
    assert result.images == 0
    assert not (result.shards / IMAGES).exists()
    assert result.manifest is not None
    assert set(result.manifest.series) == {LATENTS, "text"}
    assert all(row.images == () for row in CacheReader(result.shards).samples)
    assert "--image-draws" not in capsys.readouterr().err
    settings_module.decide(settings("5b", data_root=clips, image_draws=3))
    assert "Note: --image-draws is for image-to-video models" in capsys.readouterr().err
    settings_module.decide(settings("5b-i2v", data_root=clips, image_draws=3, frames=17, size="64x96"))
    assert "--image-draws" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no image conditions to remake"):
        encode_all(settings("5b", data_root=clips, remake_images=True))


@pytest.mark.parametrize(
    ("frames", "size", "hint"),
    [
        (17, "48x96", "The only size allowed is 64x96."),
        (9, SIZE, "The only count allowed is 17."),
    ],
)
def test_learned_positions_allow_one_size(
    i2v: Settings, tmp_path: Path, frames: int, size: str, hint: str
) -> None:
    with pytest.raises(GeometryError) as caught:
        encode_all(i2v(family="5b-i2v", frames=frames, size=size))
    assert caught.value.hint == hint
    assert not (tmp_path / "shards").exists()


def test_kills_change_no_byte_of_the_bank(i2v: Settings, encode_server: Any, tmp_path: Path) -> None:
    """Killed while latents are written, while the first draws are, in the middle, and while the bank is enlarged."""
    small = {"shard_size": 0.0016, "size": "16x32"}  # three draws a shard
    reference = i2v(shards=tmp_path / "reference", image_draws=6, **small)
    (code,), said, _ = encode_server.run(reference)
    assert code == 0, said
    expected = files(tmp_path / "reference", IMAGES)
    assert len(expected) >= 6
    killed = i2v(shards=tmp_path / "killed", image_draws=6, **small)
    kills = 0
    for lines in (4, 8, 3, 5):
        (code,), said, _ = encode_server.run(killed, after_s=0.001, after_lines=lines)
        kills += code == -signal.SIGKILL
    (code,), said, _ = encode_server.run(killed)
    assert code == 0, said
    assert kills >= 2
    assert files(tmp_path / "killed", IMAGES) == expected


def test_seeds_are_functions_of_picture_and_draw_alone() -> None:
    """The draws' order of making, the number of threads and the K do not enter: the seed is this hash."""
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    entry = entry_of(Echo(), image, source("a"), 3)
    random = generator("image", "file a", 3)
    sigma = math.exp(-3 + 0.5 * torch.randn((), generator=random).item())
    expected = -1 + sigma * torch.randn((1, 3, 1, 16, 16), generator=random)
    torch.testing.assert_close(entry.tensors["latents"], expected[0], rtol=0, atol=1e-5)


def test_bank_is_kept_in_the_precision_of_the_vae(tiny_models: Callable[[Family], Path]) -> None:
    vae = FrozenVae(tiny_models("1.5-5b-i2v"), "bfloat16", tiled=False, device=torch.device("cpu"))
    image = torch.full((16, 32, 3), 90, dtype=torch.uint8)
    entry = entry_of(vae, image, source("a"), 0)
    assert entry.tensors["latents"].dtype == torch.bfloat16


def test_pictures_are_read_and_noise_is_drawn_once_ahead_of_the_vae(
    i2v: Settings, monkeypatch: pytest.MonkeyPatch, finished: Path, tmp_path: Path
) -> None:
    """All draws of a picture come from one read, in a thread that reads; the bytes are the same."""
    drawn: list[tuple[str, int | None, str]] = []

    def noted(picture: ImageSource, number: int | None, image: torch.Tensor) -> Draw:
        drawn.append((picture.name, number, threading.current_thread().name.partition("_")[0]))
        return make_draw(picture, number, image)

    monkeypatch.setattr(pieces, "make_draw", noted)
    encode_all(i2v(shards=tmp_path / "again"))
    assert sorted(drawn) == [(f"{clip}.mp4", number, "read") for clip in range(3) for number in range(3)]
    assert files(tmp_path / "again", IMAGES) == files(finished, IMAGES)
