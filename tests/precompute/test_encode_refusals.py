"""Bad input to ``cogcache encode``: one clear message, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.config_io import load_config
from cogcache.errors import DamagedCacheError
from cogcache.precompute import encode_all
from cogcache.precompute.settings import decide
from cogcache.tiny import Family

Encode = Callable[..., tuple[int, str]]
PROGRESS = ("clips: ", "captions: ", "Note: ")


@pytest.fixture
def encode(settings: Callable[..., EncodeConfig], capsys: pytest.CaptureFixture[str]) -> Encode:
    """Runs the command line; answers exit code and what was said. Keyword arguments change the settings."""

    def call(*more: str, **changes: Any) -> tuple[int, str]:
        values = settings(**changes).model_dump(mode="json", exclude_unset=True)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        capsys.readouterr()
        code = run(["encode", *flags, *more])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call


def refused(answer: tuple[int, str], *words: str) -> str:
    code, said = answer
    assert code == 2, said
    said = "\n".join(line for line in said.splitlines() if not line.startswith(PROGRESS))
    assert said.startswith("Error: "), said
    for word in words:
        assert word in said, said
    return said


def test_missing_data_root(encode: Encode, tmp_path: Path) -> None:
    refused(encode(data_root=tmp_path / "nowhere"), "nowhere does not exist")
    assert not (tmp_path / "shards").exists()


def test_empty_data_root(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(encode(data_root=tmp_path / "empty"), "is empty")


def test_missing_model(encode: Encode, tmp_path: Path) -> None:
    refused(encode(model=str(tmp_path / "model")), "there is no model folder")
    refused(encode(model="./model"), "there is no model folder")


def test_model_that_the_hub_does_not_give(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = refused(encode(model="nobody/no-such-model"), "'nobody/no-such-model' is no local folder")
    assert len(said.splitlines()) == 2


def test_folder_that_is_no_model(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refused(encode(model=str(tmp_path / "model")), "has no folder vae")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("transformer/config.json", b"{", ("cannot be read",)),
        ("transformer/config.json", b"[]", ("is not a JSON object",)),
        ("transformer/config.json", b'{"_class_name": "UNet"}', ("not a CogVideoX checkpoint",)),
        ("vae/config.json", None, ("has no vae/config.json",)),
        ("vae/diffusion_pytorch_model.safetensors", None, ("has no .safetensors weights",)),
        ("vae/diffusion_pytorch_model.safetensors", b"pickle", ("is not a safetensors file",)),
        ("vae/diffusion_pytorch_model.safetensors", -100, ("vae", "cannot be loaded")),
        ("text_encoder/model.safetensors", -100, ("text encoder", "cannot be loaded")),
        ("tokenizer/tokenizer.json", b"{}", ("text encoder", "cannot be loaded")),
    ],
)
def test_damaged_model(
    encode: Encode,
    tiny_models: Callable[[Family], Path],
    tmp_path: Path,
    name: str,
    content: bytes | int | None,
    words: tuple[str, ...],
) -> None:
    model = shutil.copytree(tiny_models("5b"), tmp_path / "model")
    if content is None:
        (model / name).unlink()
    elif isinstance(content, int):
        (model / name).write_bytes((model / name).read_bytes()[:content])
    else:
        (model / name).write_bytes(content)
    said = refused(encode(model=str(model)), *words)
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 48}, ("48 frames", "41 and 49")),
        ({"frames": 2}, ("2 frames", "1 and 9")),
        ({"size": "100x160"}, ("multiples of 16", "96x160")),
        ({"size": "big"}, ("'big' is not a size", "480x720")),
        ({"size": "0x160"}, ("'0x160' is not a size",)),
        ({"size": "9" * 5000 + "x16"}, ("is not a size",)),
        ({"device": "toaster"}, ("'toaster' is not a device",)),
        ({"device": "meta"}, ("'meta' is not a device",)),
    ],
)
def test_wrong_values(encode: Encode, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(encode(**changes), *words)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--fps=fast", ("--fps", "'fast'")),
        ("--fps=0", ("--fps",)),
        ("--fps=nan", ("--fps",)),
        ("--frames=0", ("--frames", "greater than or equal to 1")),
        ("--shard-size=inf", ("--shard-size", "finite")),
        ("--shard-size=0", ("--shard-size",)),
        ("--workers=0", ("--workers",)),
    ],
)
def test_wrong_flags(encode: Encode, flag: str, words: tuple[str, ...]) -> None:
    refused(encode(flag), *words)


def test_flags_of_the_parser(encode: Encode) -> None:
    for flag in ("--no-such-flag", "--fit=crop", "--frames=many"):
        code, said = encode(flag)
        assert code == 2
        assert flag.split("=")[0] in said


def test_config_file(encode: Encode, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for content, words in (
        (None, ("settings.yaml cannot be read",)),
        (b"frame: 49", ("unknown setting 'frame'", "did you mean 'frames'?")),
        (b"- 49", ("must hold settings",)),
        (b"a: [", ("is not YAML",)),
        (b"\xff\xfe\x00", ("cannot be read",)),
        (b"workers: 1\nworkers: 2", ("workers", "twice")),
        (b"shard-size: 1\nshard_size: 2", ("shard_size", "twice")),
        (b"!!python/object/apply:os.system ['true']", ("is not YAML",)),
        (b"frame: 1\nsizes: 2\nworkers: none", ("'frame'", "'sizes'", "--workers")),
    ):
        if content is not None:
            file.write_bytes(content)
        refused(encode(f"--config={file}"), *words)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, clips_root: Path, tiny_models: Callable[[Family], Path]
) -> Path:
    """A cache of two clips. Read only."""
    root = tmp_path_factory.mktemp("finished")
    (root / "clips").mkdir()
    for number in (0, 1):
        for suffix in ("mp4", "txt"):
            shutil.copy(clips_root / f"{number}.{suffix}", root / "clips")
    encode_all(
        EncodeConfig(
            data_root=root / "clips",
            model=str(tiny_models("5b")),
            shards=root / "shards",
            frames=9,
            size="32x48",
            fps="source",
            device="cpu",
        )
    )
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> dict[str, Any]:
    """A copy of the finished cache, as settings."""
    shutil.copytree(finished / "shards", tmp_path / "shards")
    return {"data_root": finished / "clips", "shards": tmp_path / "shards"}


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fps": "8"}, "series.latents.fps: was 'source', is 8.0"),
        ({"size": "48x48"}, "buckets: was '9x32x48', is '9x48x48'"),
        ({"frames": 17}, "buckets: was '9x32x48', is '17x32x48'"),
        ({"vae_dtype": "bfloat16"}, "series.latents.vae_dtype: was 'float32', is 'bfloat16'"),
        ({"text_dtype": "bfloat16"}, "series.text.text_dtype: was 'float32', is 'bfloat16'"),
        ({"tiling": "on"}, "series.latents.vae_tiling: was 'off', is '48x80 overlap 1/6 1/5'"),
        ({"fit": "pad"}, "series.latents.fit: was 'cover', is 'pad'"),
        ({"short": "pad"}, "series.latents.short: was 'fail', is 'pad'"),
        ({"window": "centre"}, "series.latents.window: was 'start', is 'centre'"),
        ({"windows": 2}, "series.latents.window: was 'start', is '2 windows'"),
        ({"interpolation": "bilinear"}, "series.latents.interpolation: was 'bicubic', is 'bilinear'"),
        ({"reader": "decord"}, "series.latents.reader: was 'pyav', is 'decord'"),
        ({"family": "2b"}, "model.positions: was 'rope', is 'sincos'"),
    ],
)
def test_other_settings_never_mix(
    encode: Encode, copied: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    before = files(copied["shards"])
    refused(
        encode(**copied, **changes),
        "made with other settings" if line.startswith(("series", "model")) else "Name the old ones",
        line,
    )
    assert files(copied["shards"]) == before


@pytest.mark.parametrize("name", ["manifest.json", "cache.json", "samples.jsonl"])
def test_damaged_records_are_noticed(encode: Encode, copied: dict[str, Any], name: str) -> None:
    """A damaged identity is refused; tables and the manifest, which encode writes anew, are repaired."""
    path = copied["shards"] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if name != "cache.json":  # which only encode reads
        with pytest.raises(DamagedCacheError):
            CacheReader(copied["shards"])
    code, said = encode(**copied)
    if name == "cache.json":
        refused((code, said), "cache.json is damaged")
    else:
        assert code == 0, said
        assert len(CacheReader(copied["shards"]).samples) == 2


def test_folder_that_cannot_be_written(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(encode(shards=tmp_path / "file" / "shards"), "cannot be written", "is a file, not a folder")
    refused(encode(shards=tmp_path / "file"), "cannot be written")
    refused(encode(shards=Path("/proc/nothing")), "cannot be written")


def test_unreadable_clip_stops_nothing(
    encode: Encode, settings: Callable[..., EncodeConfig], clips_root: Path, tmp_path: Path
) -> None:
    """It is told, kept in the ledger, tried again by the next run, and done once the file is right."""
    root = shutil.copytree(clips_root, tmp_path / "clips")
    good = (root / "3.mp4").read_bytes()
    (root / "3.mp4").write_bytes(good[:2000])
    (root / "a[").mkdir()
    shutil.copy(root / "3.mp4", root / "a[" / "b].mp4")  # reads as markup: a[/b]
    (root / "a[" / "b].txt").write_text("[bold]markup[/]")
    (root / "empty.mp4").write_bytes(b"")
    (root / "empty.txt").write_text("Nothing")
    shards = tmp_path / "shards"

    code, said = encode(data_root=root)
    assert code == 3, said
    assert "Incomplete: 3 of 10 clips failed" in said
    assert "a[/b].mp4" in said
    failures = CacheReader(shards).failures
    assert sorted(f.source for f in failures) == ["3.mp4", "a[/b].mp4", "empty.mp4"]
    assert {f.source: f.reason for f in failures}["empty.mp4"] == "empty file"
    assert len(CacheReader(shards).samples) == 7
    before = files(shards)

    code, said = encode(data_root=root)
    assert code == 3
    assert "7 clips ready, 3 failed. Encoded now: 0 latents" in said
    after = files(shards)
    assert before.pop("journal.jsonl") != after.pop("journal.jsonl")
    assert before == after

    (root / "3.mp4").write_bytes(good)
    for name in ("a[/b]", "empty"):
        (root / f"{name}.mp4").unlink()
        (root / f"{name}.txt").unlink()
    code, said = encode(data_root=root)
    assert code == 0, said
    assert "8 clips ready, 0 failed. Encoded now: 1 latent, 0 captions." in said
    assert not CacheReader(shards).failures
    tried = [json.loads(line) for line in (shards / "journal.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "failed" for event in tried) == 4  # two of the three hold the same bytes
    result = encode_all(settings(data_root=root))
    assert (result.encoded, result.captions, result.failures) == (0, 0, [])


def test_clip_that_vanishes_or_cannot_be_opened(encode: Encode, clips_root: Path, tmp_path: Path) -> None:
    """``/proc/self/mem`` is a file that nobody can read from its start."""
    root = shutil.copytree(clips_root, tmp_path / "clips")
    (root / "9.mp4").symlink_to("/proc/self/mem")
    (root / "9.txt").write_text("Unreadable")
    code, said = encode("--allow-outside", data_root=root)
    assert code == 3, said
    (failure,) = CacheReader(tmp_path / "shards").failures
    assert (failure.source, failure.reason) == ("9.mp4", "cannot be read: Input/output error")


def test_settings_are_saved_and_load_back(
    settings: Callable[..., EncodeConfig], tmp_path: Path, finished: Path
) -> None:
    config = settings(data_root=finished / "clips", workers=1)
    encode_all(config)
    saved = tmp_path / "shards" / "encode.config.yaml"
    again = load_config(EncodeConfig, {}, saved)
    assert again == decide(config).effective() == decide(again).effective()
    assert (again.frames, again.size, again.fps, again.tiling) == (
        config.frames,
        config.size,
        config.fps,
        "off",
    )
    assert again.data_root.is_absolute()
    assert "auto" not in (again.vae_dtype, again.text_dtype)
    assert run(["encode", f"--config={saved}"]) == 0
