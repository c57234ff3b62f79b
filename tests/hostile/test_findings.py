"""One small test for each defect that hostile input has found, where no other test is nearer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import verify_kit
from making_videos import write_video
from PIL import Image
from safetensors.torch import save_file

from cogcache.cache.check import check_cache
from cogcache.cache.reader import CacheReader
from cogcache.cache.regular import open_regular
from cogcache.cache.repair import repair_cache
from cogcache.cache.tensors import load_tensors
from cogcache.cache.writer import CacheWriter
from cogcache.config import TrainConfig
from cogcache.config_io import load_config
from cogcache.errors import (
    CogcacheError,
    ConfigError,
    DatasetError,
    GeometryError,
    LoraError,
    ModelError,
    VideoError,
)
from cogcache.geometry import Size, check_size
from cogcache.lora import read_lora_header
from cogcache.lora.foreign import check_pattern
from cogcache.pictures import load_picture
from cogcache.precompute.datasets import find_clips
from cogcache.tiny import Family
from cogcache.train.model import load_scheduler
from cogcache.variants import read_variant, weights_dtype
from cogcache.video import ClipRequest, load_clip

BAD_PATTERNS = ("(a+)+$", "(x|x)*y", "a?" * 30 + "a" * 30, ".*.*.*.*z", "[", "x" * 400, r"((\)+)+")
LAYER = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "cache"
    verify_kit.encode(root)
    return root


FILES = (
    "manifest.json",
    "cache.json",
    "samples.jsonl",
    "journal.jsonl",
    "latents/*.index.jsonl",
    "latents/*.tar",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, made: Path, tmp_path: Path) -> None:
    for command in (
        CacheReader,
        check_cache,
        lambda root: repair_cache(check_cache(root)),
        verify_kit.encode,
    ):
        root = Path(shutil.copytree(made, tmp_path / "cache"))
        path = next(root.glob(name))
        path.unlink()
        os.mkfifo(path)
        with contextlib.suppress(CogcacheError):
            command(root)
        shutil.rmtree(root)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            open_regular(path)


@pytest.mark.parametrize("size", [-1, -512, 1 << 40, 1 << 90])
def test_a_line_of_an_unfinished_shard_decides_no_memory(size: int, made: Path, tmp_path: Path) -> None:
    from cogcache.cache.lines import dump_sealed, seal_line

    root = Path(shutil.copytree(made, tmp_path / "cache"))
    index = next((root / "latents").glob("*.index.jsonl"))
    name = index.name.removesuffix(".index.jsonl")
    line = json.loads(index.read_bytes().split(b"\n")[0])
    line["members"][0]["size"] = size
    index.unlink()
    (root / "manifest.json").unlink()
    index.with_name(f"{name}.tar").rename(index.with_name(f"{name}.tar.part"))
    index.with_name(f"{name}.index.part").write_bytes(seal_line(line))
    index.with_name(f"{name}.plan.json").write_bytes(dump_sealed({"shard": name, "keys": [line["key"]]}))
    writer = CacheWriter.open(root, verify_kit.IDENTITY)
    for job in writer.jobs("latents", [line["key"]]):
        with job:
            assert job.remaining == (line["key"],)


@pytest.mark.parametrize(
    "text",
    ["!!int ''", "!!bool maybe", "!!timestamp soon", "[" * 5000, "!!python/object/apply:os.system ['true']"],
)
def test_settings_that_break_the_yaml_parser(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"steps: {text}")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(TrainConfig, {}, path)


def test_settings_that_would_unfold_without_end_are_told_in_short(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    names = [f"a{number}" for number in range(30)]
    path.write_text(
        "a0: &a0 [x, x]\n"
        + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise(names))
        + "steps: *a29\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, {}, path)
    assert len(str(error.value)) < 20_000


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_patterns_that_could_match_for_ever(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|regular expression"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["to_q", r"^transformer_blocks\.0\.attn1\.to_q", r".*\.(1[0-9]|2\d)\..*to_(q|k)", r"\d+"]
)
def test_patterns_as_layers_need_them(pattern: str) -> None:
    check_pattern(pattern)


def lora(path: Path, **extra: torch.Tensor) -> Path:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    save_file({f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up, **extra}, path)
    return path


def test_a_lora_with_an_empty_alpha(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="cannot be read"):
        read_lora_header(lora(tmp_path / "x.safetensors", **{f"{LAYER}.alpha": torch.zeros(0)}))


def test_a_lora_with_endless_names(tmp_path: Path) -> None:
    extra = {f"transformer.{'x' * 5000}.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    with pytest.raises(LoraError, match="a name of 5"):
        read_lora_header(lora(tmp_path / "x.safetensors", **extra))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("transformer/config.json", "[" * 100_000),
        ("transformer/config.json", {"patch_size": 0}),
        ("vae/config.json", {"temporal_compression_ratio": float("inf")}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
    ],
)
def test_configs_of_a_model(
    name: str, text: object, tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    whole = json.loads((root / name).read_text())
    (root / name).write_text(text if isinstance(text, str) else json.dumps(whole | dict(text)))
    with pytest.raises(ModelError):
        read_variant(root)


@pytest.mark.parametrize("shape", [[0, 1 << 64], [0, 1 << 62, 1 << 62], [0] * 2000])
def test_an_empty_tensor_of_an_impossible_shape(shape: list[int]) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with contextlib.suppress(ValueError):
        load_tensors(len(header).to_bytes(8, "little") + header)


def test_a_header_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ModelError, match="not a safetensors file"):
        weights_dtype(tmp_path)


def test_settings_that_the_scheduler_does_not_take(
    tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    path = root / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "x"}))
    with pytest.raises(ModelError, match="scheduler"):
        load_scheduler(root)


def test_pictures_that_would_start_another_program(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(VideoError, match="cannot identify"):  # and not: Ghostscript is missing
        load_picture(path, Size(32, 48))


def test_a_picture_that_claims_more_pixels_than_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr("numpy.asarray", full)
    with pytest.raises(VideoError, match="cannot be read"):
        load_picture(path, Size(32, 48))


def test_half_a_character_in_a_caption(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "\\ud800"}\n')
    with pytest.raises(DatasetError, match="half a character"):
        find_clips(tmp_path, "auto", allow_outside=False)


def test_links_out_of_the_data_root_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to find out which kind of list there is."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    for name in ("a.mp4", "a.txt"):
        (outside / name).write_bytes(b"x")
    (root / "link").symlink_to(outside)
    (root / "loop.txt").symlink_to("loop.txt")
    looked: list[Path] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path).resolve()) or scan(path))
    with pytest.raises(DatasetError):
        find_clips(root, "auto", allow_outside=False)
    assert outside.resolve() not in looked
    (root / "loop.txt").unlink()
    assert len(find_clips(root, "auto", allow_outside=True)) == 1


@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_a_list_that_leads_to_a_video_is_no_video(text: str, reader: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "real.mp4", frames=12)
    path = tmp_path / "list.mp4"
    for name in (video.name, str(video)):
        path.write_text(text.format(name))
        with pytest.raises(VideoError, match="not a video"):
            load_clip(path, ClipRequest(9, Size(32, 48), reader=reader))


def test_a_size_beyond_all_floats() -> None:
    with pytest.raises(GeometryError, match="must be multiples of 16"):
        check_size(Size(16 * 10**400 + 1, 16), 16)
