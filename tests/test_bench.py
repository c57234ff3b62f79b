"""The bench commands measure what they say; how fast is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from typer.testing import CliRunner

from cogcache.bench import facts, frozen, run_encode
from cogcache.bench import train as bench_train
from cogcache.bench.card import cap_gpu_memory
from cogcache.bench.encode import Accuracy, ClipRow, TextRow
from cogcache.bench.random_cache import random_cache, real_variant
from cogcache.bench.real import real_config
from cogcache.bench.recipes import DEFAULT_RECIPES, RECIPES
from cogcache.bench.video_clips import make_videos
from cogcache.cache.reader import CacheReader
from cogcache.cli import app, run
from cogcache.errors import ModelError
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.train.model import load_transformer
from cogcache.variants import Variant, read_variant


def test_load_writes_every_row_with_its_share_of_raw(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "load.json"
    words = ["bench", "load", "--clips", "3", "--workers", "1,2", "--work", str(tmp_path), "--json", str(out)]
    done = CliRunner().invoke(app, [*words, "--repeats", "1", "--steps", "4"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    rows = {(r["way"], r["order"], r["cold"], r["workers"]) for r in found["reads"]}
    ways = {way for way, *_ in rows}
    assert {"raw", "safetensors", "webdataset"} <= ways
    assert len(rows) == len(found["reads"]) == len(ways) * 2 * 2 * 2
    sample_mb = (2 * 16 * 13 * 60 * 90 + 226 * 4096) * 2 / 1e6
    for row in found["reads"]:
        assert row["mb_per_s"] / row["samples_per_s"] == pytest.approx(sample_mb, rel=1e-3)
        assert row["way"] != "raw" or row["share_of_raw"] == 1
    assert [wait["workers"] for wait in found["waiting"]["webdataset"]] == [1, 2]
    assert "Waiting for data: 4/4" in done.stderr
    assert found["facts"]["cores"] >= 1
    assert found["facts"]["versions"]["torch"]


def test_facts_name_the_versions_of_what_is_installed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "decord"

    def version(name: str) -> str:
        if name == gone:
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(facts, "metadata", SimpleNamespace(**{**vars(metadata), "version": version}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # torch is built for GPUs, and there is none
    found: Any = facts.machine_facts()["versions"]
    for name in ("torch", "diffusers", "peft", "transformers", "accelerate", "av"):
        assert found[name] == metadata.version(name)
    assert not {gone, "CUDA", "cuDNN", "driver"} & set(found)
    code = (
        "from cogcache.bench.facts import machine_facts as f; f(); import sys; print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"peft", "transformers", "accelerate", "av", "decord"} & set(done.stdout.split())


def test_facts_of_a_gpu_name_its_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ``nvidia-smi``, and then without any."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && printf "580.95.05\\n580.95.05\\n"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found: Any = facts.machine_facts()["versions"]
    assert (found["CUDA"], found["cuDNN"], found["driver"]) == ("13.0", "91900", "580.95.05")
    script.unlink()
    found = facts.machine_facts()["versions"]
    assert "CUDA" in found
    assert "driver" not in found


def test_random_cache_holds_real_shapes(tmp_path: Path) -> None:
    reader = CacheReader(random_cache(tmp_path / "cache", "1.5-5b", 2, real_variant("1.5-5b")))
    row = reader.samples[1]
    assert reader.read("latents", row.latents).tensors["moments"].shape == (32, 21, 96, 170)
    assert reader.read("text", row.text).tensors["prompt_embeds"].shape == (224, 4096)


@pytest.mark.parametrize("workers", ["", "0", "two", "1,,2"])
def test_workers_must_be_numbers(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "load", "--workers", workers, "--work", str(tmp_path)]) == 2
    assert "--workers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_training_step_needs_a_gpu_and_known_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", "--recipes", "small,huge"]) == 2
    assert "'huge'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(["bench", "train"]) == 2
        assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_real_configs_have_the_published_size(family: Family, tiny_models: Callable[[Family], Path]) -> None:
    tiny = json.loads((tiny_models(family) / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(real_config(family, tiny))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx({"2b": 1.69, "5b-i2v": 5.60, "1.5-5b-i2v": 5.57}[family], rel=0.02)


@pytest.mark.parametrize("recipe", ["reference", "plain", "small", "tiny", "plain-group-offload"])
@pytest.mark.parametrize("family", ["5b", "1.5-5b-i2v"])
def test_a_row_of_the_training_table(
    family: Family, recipe: str, tiny_models: Callable[[Family], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model on the CPU in place of the real one, and nothing compiled."""

    def tiny(family: Family, dtype: torch.dtype, device: torch.device) -> tuple[Any, Variant]:
        root = tiny_models(family)
        return load_transformer(root, dtype).to(device), read_variant(root)

    plain = {
        name: replace(one, measures=replace(one.measures, compile=False) if one.measures else None)
        for name, one in RECIPES.items()
    }
    monkeypatch.setattr(bench_train, "real_transformer", tiny)
    monkeypatch.setattr(bench_train, "RECIPES", plain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = bench_train.measure_step(bench_train.RowSettings(recipe, family, "17x64x96", 2, 4, 2))
    assert row.step_s > 0
    assert row.steps == 2
    assert 0.1 < row.loss < 10
    if "offload" in recipe:
        assert row.predicted_gib is None  # the planner knows nothing of it
    else:
        assert row.predicted_gib is not None
        assert 0 < row.predicted_gib < 1
    assert row.predicted_s is None  # no GPU that it knows


def test_a_recipe_that_fails_is_a_row_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of the rows are real; what they run is not."""
    row = bench_train.StepRow("plain", 1, 5, 2.0, None, 3.0, None, 4.0, 0.5)
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "recipe = json.loads(sys.argv[-1])['recipe']\n"
        "if recipe == 'small':\n"
        "    print('RuntimeError: on two devices, cuda:0 and cpu!\\nsome last word', file=sys.stderr)\n"
        "    sys.exit(1)\n"
        "if recipe == 'tiny':\n"
        "    os.kill(os.getpid(), 9)\n"
        f"print('noise')\nprint(json.dumps({asdict(row)!r}))\n"
    )
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {child} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(facts, "_gpu", lambda: "a GPU")
    out = tmp_path / "train.json"
    assert run(["bench", "train", "--recipes", "small, plain,tiny,plain", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    measured = {**asdict(row), "ratio": None, "samples_per_s_per_gib": pytest.approx(1 / 2.0 / 3.0)}
    assert rows == [
        {"recipe": "small", "failed": "RuntimeError: on two devices, cuda:0 and cpu!"},
        measured,
        {"recipe": "tiny", "failed": "ended with code -9 and no word"},
        measured,
    ]


def test_training_rows_end_in_a_table_beside_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        bench_train.StepRow("small", 2, 5, 4.0, 4.25, 8.0, 7.75, 9.0, 0.5),
        bench_train.StepRow("reference", 2, 5, 10.0, None, 32.0, None, 9.0, 0.5),
        bench_train.FailedRow("fast", "RuntimeError: out of memory"),
    ]
    monkeypatch.setattr(bench_train, "rows", lambda _: iter(found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(facts, "_gpu", lambda: "a GPU")
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "train.json"
    assert run(["bench", "train", "--recipes", "small,reference,fast", "--json", str(out)]) == 0
    small, reference, failed = json.loads(out.read_text())["rows"]
    assert (small["ratio"], reference["ratio"]) == (2.5, 1.0)
    assert small["samples_per_s_per_gib"] == 2 / 4.0 / 8.0
    assert (small["steps"], reference["steps"]) == (5, 5)
    assert failed == asdict(found[2])
    told = capsys.readouterr().err
    assert "small: 4.000 s (planned 4.25, +6.2%), 8.00 GiB" in told
    table = [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in told.splitlines() if "│" in line
    ]
    assert table == [
        ["small", "4.000", "2.50", "4.250", "8.00", "7.75", "0.0625"],
        ["reference", "10.000", "1.00", "", "32.00", "", "0.00625"],
        ["fast", "failed", "", "", "", "", ""],
    ]
    [headings] = [line for line in told.splitlines() if "┃" in line]
    for name in ("s/step", "ratio", "planned s", "peak GiB", "planned GiB", "samples/s per GiB"):
        assert name in headings


def test_comparisons_are_measured_only_where_asked_for() -> None:
    assert set(RECIPES) - set(DEFAULT_RECIPES) == {
        "plain-compiled",
        "tiny-attention-again",
        "tiny-int8",
        "group-offload",
        "group-offload-block",
        "plain-group-offload",
    }


@pytest.fixture
def tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of those of real size."""
    monkeypatch.setattr(frozen, "REAL_VAE", {})
    monkeypatch.setattr(frozen, "REAL_TEXT", {})


@pytest.mark.usefixtures("tiny_encoders")
def test_encoding_is_measured_beside_the_reference(tmp_path: Path) -> None:
    """With tiny encoders on the CPU in place of the real ones; the way of the clips is encode's own."""
    videos = make_videos(tmp_path / "videos", 3, Size(96, 160), frames=40)
    words = ["bench", "encode", "--data-root", str(videos), "--bucket", "9x64x96", "--device", "cpu"]
    words += [
        "--captions",
        "5",
        "--text-batch-size",
        "2",
        "--work",
        str(tmp_path),
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "x.json").read_text())
    assert [(row["recipe"], row["clips"]) for row in found["clips"]] == [
        ("reference", 3),
        ("untiled", 3),
        ("tiled", 3),
    ]
    for row in found["clips"]:
        assert row["clips_per_s"] == pytest.approx(row["clips"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["clips_per_s"] / found["clips"][0]["clips_per_s"])
    assert [row["captions"] for row in found["text"]] == [5, 5, 5]
    assert "streamed" in found["text"][2]["recipe"]
    errors = {row["encoder"]: row["error"] for row in found["accuracy"]}
    assert 0 < errors["ours float16"] < errors["ours bfloat16"] < 0.1
    assert errors["ours bfloat16"] == pytest.approx(errors["diffusers bfloat16"], rel=0.2)
    assert errors["ours bfloat16, tiled"] > errors["ours bfloat16"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path != videos]  # caches are gone


def test_no_two_videos_are_equal(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", 8, Size(96, 160), frames=2)
    assert len({path.read_bytes() for path in videos.glob("*.mp4")}) == 8


@pytest.mark.usefixtures("tiny_encoders")
def test_a_row_that_does_not_fit_the_memory_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own error, and what ``encode`` makes of it; the next row is measured."""
    videos = make_videos(tmp_path / "videos", 1, Size(96, 160), frames=40)

    def row(_: object, *, tiled: bool) -> ClipRow:
        if not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB. Much else.")
        return ClipRow("tiled", 1, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0)

    def text(*_: object, offloaded: bool, **__: object) -> Any:
        if not offloaded:
            raise ModelError("T5 does not fit.")

    monkeypatch.setattr(run_encode, "our_row", row)
    monkeypatch.setattr(frozen, "real_text", text)
    monkeypatch.setattr(run_encode, "text_rows", lambda *_: iter([TextRow("streamed", 2, 1.0, 0.0)]))
    out = tmp_path / "x.json"
    words = ["bench", "encode", "--data-root", videos, "--device", "cpu", "--work", tmp_path, "--json", out]
    assert run([*map(str, words), "--parts", "untiled,tiled,text"]) == 0
    found = json.loads(out.read_text())
    assert found["clips"][0] == {"recipe": "untiled", "failed": "CUDA out of memory."}
    assert found["clips"][1]["recipe"] == "tiled"
    assert found["text"][0] == {"recipe": "one by one, batches of 32", "failed": "T5 does not fit."}
    assert found["text"][1]["recipe"] == "streamed"


@pytest.mark.usefixtures("tiny_encoders")
def test_figures_of_encoding_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is cut off keeps what it has measured."""
    videos = make_videos(tmp_path / "videos", 2, Size(96, 160), frames=40)
    out = tmp_path / "x.json"

    def cut_off(*_: object) -> Iterator[TextRow]:
        assert len(json.loads(out.read_text())["accuracy"]) == 5
        yield TextRow("one by one", 2, 1.0, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_encode, "accuracy", lambda *_: iter([Accuracy("ours", 0.01)] * 5))
    monkeypatch.setattr(run_encode, "text_rows", cut_off)
    request: dict[str, Any] = {"data_root": videos, "clips": 2, "bucket": "9x64x96", "device": "cpu"}
    request |= {
        "fps": 8.0,
        "gpu_memory": None,
        "workers": None,
        "captions": 2,
        "text_batch_size": 2,
        "work": tmp_path,
        "json_out": out,
    }
    with pytest.raises(KeyboardInterrupt):
        run_encode.bench_encode(parts="untiled,accuracy,text", **request)
    found = json.loads(out.read_text())
    assert [row["recipe"] for row in found["clips"]] == ["untiled"]
    assert len(found["accuracy"]) == 5
    assert [row["recipe"] for row in found["text"]] == ["one by one"]
    assert found["facts"]["cores"] >= 1


def test_encoding_refuses_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "encode", "--parts", "tiled,speed", "--work", str(tmp_path / "work")]) == 2
    assert "'speed'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("command", ["train", "encode"])
def test_memory_is_limited_only_on_a_gpu_that_has_as_much(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "bench",
        command,
        "--gpu-memory",
        "12",
        *(["--work", str(tmp_path)] if command == "encode" else []),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(words) == 2
    assert "there is none" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(facts, "_driver", lambda: None)
    assert run(words) == 2
    assert "8.0 GiB" in capsys.readouterr().err


def test_memory_is_limited_to_its_share_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=48 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    cap_gpu_memory(12)
    assert limits == [(0.25, 0), (0.25, 1)]
    cap_gpu_memory(None)
    assert len(limits) == 2
