"""Small tests for defects that hostile zarr arrays, rows, facts and checkpoints have shown."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import cache_kit
import pytest
import torch
import verify_kit
from hostile_cache import CacheBox
from hostile_zarr import ZarrBox
from safetensors.torch import save
from torch import nn

from cogcache.cache.check import check_cache
from cogcache.cache.format import MAX_SLOTS, SampleRecord
from cogcache.cache.index import parse_index
from cogcache.cache.lines import dump_sealed, parse_json, seal_line
from cogcache.cache.reader import CacheReader
from cogcache.cache.repair import repair_cache
from cogcache.cache.writer import CacheWriter
from cogcache.cache.zarr.array import ZarrArray
from cogcache.errors import CheckpointError, CogcacheError, DamagedCacheError
from cogcache.inspect.gather import gather
from cogcache.inspect.latents import look_at
from cogcache.train.checkpoints import load_checkpoint
from cogcache.train.engine import PlainEngine
from cogcache.train.optimizer import check_optimizer_state


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> ZarrBox:
    return ZarrBox(tmp_path_factory.mktemp("made") / "box")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["zarr.json", "latents/*/zarr.json", "latents/*/c.0*", "*/*.plan.json"])
def test_a_pipe_in_place_of_a_file_of_an_array_is_not_waited_for(name: str, box: ZarrBox) -> None:
    files = {**box.files, "latents/latents-9x32x48-00007.plan.json": b"{}"}
    commands: tuple[Callable[[Path], object], ...] = (
        CacheReader,
        check_cache,
        lambda root: repair_cache(check_cache(root)),
        verify_kit.encode,
        lambda root: CacheWriter.open(root, box.identity).plan("latents", ["f" * 32], 2, "9x32x48"),
    )
    for command in commands:
        root = box.lay_out(files)
        path = next(root.glob(name))
        path.unlink()
        os.mkfifo(path)
        with mock.patch.object(cache_kit, "BACKEND", "zarr"), contextlib.suppress(CogcacheError):
            command(root)
        shutil.rmtree(root)


@pytest.mark.parametrize("slots", [MAX_SLOTS + 1, 1 << 60, 0, 2.0, "2", None])
def test_slots_of_a_plan_decide_no_memory(slots: object, box: ZarrBox) -> None:
    keys = [key for key, _ in box.entries("latents/latents-9x32x48-00000.index.jsonl")[1]]
    plan = {"shard": "latents-9x32x48-00000", "keys": keys, "slots": slots}
    files = {name: data for name, data in box.files.items() if "latents" not in name}
    files = {name: data for name, data in files.items() if name != "manifest.json"}
    root = box.lay_out({**files, "latents/latents-9x32x48-00000.plan.json": dump_sealed(plan)})
    writer = CacheWriter.open(root, box.identity)
    with pytest.raises(DamagedCacheError, match="number of slots"):
        list(writer.jobs("latents", keys))


def test_an_index_of_more_bytes_than_a_file_can_have() -> None:
    members = [
        {"crc32": 0, "name": "0" * 32 + end, "offset": 1 << 64, "size": 1} for end in (".chunk", ".json")
    ]
    body = (json.dumps({"key": "0" * 32, "members": members}) + "\n").encode()
    lines = hashlib.sha256(body).hexdigest()
    for size, told in ((1 << 65, "larger than any file"), ((1 << 63) - 1, "outside")):
        end = {"bytes": size, "entries": 1, "lines_sha256": lines, "sha256": "0" * 64}
        with pytest.raises(ValueError, match=told):
            parse_index(body + seal_line({"end": end}))


@pytest.mark.parametrize("text", ["1e999", "[-1e999]", '{"a": 1e400}'])
def test_numbers_beyond_all_floats_are_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="is not JSON"):
        parse_json(text.encode())


@pytest.mark.parametrize("dtype", [{}, [], None, 5, "float64"])
def test_dtypes_that_are_none(dtype: object) -> None:
    with pytest.raises(ValueError, match="dtype"):
        ZarrArray.checked("moments", dtype, [1], "zstd")


@pytest.mark.parametrize(
    "change",
    [{"height": 0}, {"frames": 10**6}, {"width": -1}, {"fps": "NaN"}, {"fps": float("inf")}, {"fps": 0}],
)
def test_rows_that_are_of_no_bucket(change: dict[str, object]) -> None:
    row = verify_kit.sample(0).model_dump()
    SampleRecord.model_validate(row)
    with pytest.raises(ValueError, match=next(iter(change))):
        SampleRecord.model_validate(row | change)


@pytest.mark.parametrize("times", [5, {}, "ab", [None, 1], [0, 10**400], [-1e308, 1e308], [[], []]])
def test_times_that_are_none_are_not_told(times: object, box: ZarrBox) -> None:
    name = "latents/latents-9x32x48-00000.index.jsonl"
    _, entries = box.entries(name)
    for _, parts in entries:
        said = json.loads(parts[1])
        said["facts"]["times_s"] = times
        parts[1] = json.dumps(said).encode()
    root = box.lay_out(box.with_entries(name, entries))
    report = gather(CacheReader(root))
    assert {clip["seconds"] for clip in report["samples"]} == {None}


def test_latents_of_another_form_are_told(tmp_path: Path) -> None:
    tar = CacheBox(tmp_path / "tar")
    name = next(name for name in tar.indexes if name.startswith("latents"))
    _, entries = tar.entries(name)
    for _, parts in entries:
        parts[0] = save({"moments": torch.ones(4)})
    reader = CacheReader(tar.lay_out(tar.with_entries(name, entries)))
    with pytest.raises(DamagedCacheError, match="no posterior of a clip"):
        gather(reader, look_at(reader, False, None))


SCALER = {
    "scale": 4.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        json.dumps({"step": "7"}),
        json.dumps({"step": float("inf")}),
        json.dumps({"step": -1}),
        json.dumps({"scaler": SCALER | {"scale": 10**40}}),
        json.dumps({"scaler": SCALER | {"scale": "x"}}),
        json.dumps({"scaler": SCALER | {"scale": 1e39}}),
        json.dumps({"scaler": SCALER | {"growth_interval": 0.5}}),
        json.dumps({"scaler": SCALER | {"_growth_tracker": 1 << 40}}),
    ],
)
def test_records_of_a_checkpoint_that_are_none(text: str, tmp_path: Path) -> None:
    sound = {"step": 7, "run": {}, "scaler": SCALER, "sha256": {}}
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(sound))
    assert load_checkpoint(tmp_path).state.scaler == SCALER
    path.write_text(json.dumps(sound | json.loads(text)) if text.startswith("{") else text)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_the_record_of_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trainer_state.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        load_checkpoint(tmp_path)


def optimizer_tensors() -> dict[str, torch.Tensor]:
    return {"w.step": torch.tensor(3.0), "w.exp_avg": torch.ones(2), "w.exp_avg_sq": torch.ones(2)}


@pytest.mark.parametrize(
    "change",
    [
        {"w.step": torch.tensor(-1e30)},
        {"w.step": torch.tensor(float("nan"))},
        {"w.step": torch.ones(2)},
        {"w.step": torch.tensor(3)},
        {"w.exp_avg": torch.ones(2, dtype=torch.float64)},
        {"w.exp_avg": torch.ones(2).to(torch.float8_e4m3fn)},
        {"w.other": torch.ones(2)},
        {"w": torch.ones(2)},
    ],
)
def test_optimizer_state_that_would_break_the_next_step(change: dict[str, torch.Tensor]) -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2))}
    check_optimizer_state(parameters, optimizer_tensors())
    check_optimizer_state(parameters, {})
    with pytest.raises(CheckpointError, match="does not fit"):
        check_optimizer_state(parameters, optimizer_tensors() | change)


@pytest.mark.parametrize("gone", ["w.step", "w.exp_avg", "w.exp_avg_sq"])
def test_optimizer_state_that_lacks_a_part(gone: str) -> None:
    state = optimizer_tensors()
    del state[gone]
    with pytest.raises(CheckpointError, match=f"no optimizer state for {gone}"):
        check_optimizer_state({"w": nn.Parameter(torch.zeros(2))}, state)


def test_loss_scaling_that_lacks_a_part() -> None:
    engine = PlainEngine.__new__(PlainEngine)
    engine.parameters = {}
    engine.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    engine.scaler = torch.amp.GradScaler("cpu", enabled=True)
    engine.restore({}, SCALER)
    for scaler in ({}, {"scale": 4.0}):
        with pytest.raises(CheckpointError, match="loss scaling"):
            engine.restore({}, scaler)
