"""Hostile checkpoints, which ``train --resume`` reads, and hostile rows and facts, which inspect and export show."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_cache import CacheBox, careless, clear, line, spoil_tensors
from hostile_kit import Case, Target
from hostile_mutations import NUMBERS, STRINGS, mutate_json, spoil_json
from hostile_zarr import ZarrBox
from safetensors.torch import save
from torch import nn

from cogcache.cache.format import LATENTS, SAMPLES_FILE, canonical_json
from cogcache.cache.reader import CacheReader
from cogcache.cache.transfer import export_shards
from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError
from cogcache.inspect.gallery import gallery
from cogcache.inspect.gather import gather
from cogcache.inspect.latents import look_at
from cogcache.inspect.table import as_text
from cogcache.train.checkpoints import STATE_FILE, find_checkpoint
from cogcache.train.engine import PlainEngine
from cogcache.train.optimizer import make_optimizer, optimizer_state
from cogcache.train.run import check_resume

__all__ = ["run_targets"]

_RUN = {"lr": 1e-3, "seed": 0, "batch_size": 1, "held_out": [], "shards_fingerprint": {"a": 1}}


def run_targets(folder: Path) -> list[Target]:
    """Both; ``folder`` is theirs to write in."""
    folder.mkdir()
    cases = (("checkpoint", _checkpoint), ("inspect", _inspect))
    return [Target(name, case(folder), (folder,)) for name, case in cases]


def _engine() -> PlainEngine:
    """The part of an engine that takes up a checkpoint."""
    engine = PlainEngine.__new__(PlainEngine)
    engine.config = TrainConfig(shards=Path("none"))
    module = nn.Linear(4, 2)
    engine.parameters = dict(module.named_parameters())
    engine.optimizer = make_optimizer(engine.config, engine.parameters)
    engine.scaler = torch.amp.GradScaler("cpu", enabled=True)
    engine._halted = torch.tensor(False)
    return engine


def _update(engine: PlainEngine) -> None:
    engine.backward(torch.stack([parameter.square().sum() for parameter in engine.parameters.values()]).sum())
    engine.step(1e-3, torch.tensor(False))


def _checkpoint(folder: Path) -> Case:
    engine = _engine()
    _update(engine)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    tensors = {
        "pytorch_lora_weights.safetensors": save({"transformer.a.lora_A.weight": torch.ones(2, 4)}),
        "optimizer.safetensors": save(optimizer_state(engine.optimizer, engine.parameters)),
    }
    record = {"step": 7, "run": _RUN, "scaler": {**scaler.state_dict(), "scale": 4.0}}
    output = folder / "output"

    def lay_out(random: Random) -> str:
        if output.exists():
            clear(output)
        for number in random.choice(((7,), (7, 9))):
            root = output / f"checkpoint-{number:06d}"
            root.mkdir(parents=True)
            kind = random.randrange(4)
            files = dict(tensors)
            if kind == 0:
                name = random.choice(sorted(files))
                files[name] = spoil_tensors(files[name], random)
            elif kind == 1:
                files["optimizer.safetensors"] = _other_state(engine, random)
            for name, data in files.items():
                (root / name).write_bytes(data)
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            value = {**record, "sha256": hashes}
            data = json.dumps(value).encode()
            if kind == 2:
                data = careless(_spoil_record(value, random))
            elif kind == 3 and random.random() < 0.3:
                data = spoil_json(data, random)
            (root / STATE_FILE).write_bytes(data)
        return random.choice(("latest", str(output / "checkpoint-000007")))

    def case(random: Random) -> None:
        found = find_checkpoint(output, lay_out(random))
        if found is None:
            return
        check_resume(found, _RUN, TrainConfig(shards=folder, steps=100))
        other = _engine()
        other.restore(found.optimizer, found.state.scaler)
        try:
            _update(other)
        except FloatingPointError:  # the trainer tells of it
            raise CheckpointError("not finite") from None

    return case


def _spoil_record(value: dict[str, Any], random: Random) -> Any:
    if random.random() < 0.3:
        return {**value, "step": random.choice((*NUMBERS, *STRINGS))}
    if random.random() < 0.4:
        scaler = {**value["scaler"]}
        scaler[random.choice(sorted(scaler))] = random.choice((*NUMBERS, *STRINGS, None, [], {}))
        return {**value, "scaler": random.choice((scaler, {}, mutate_json(scaler, random)))}
    return mutate_json(value, random)


def _other_state(engine: PlainEngine, random: Random) -> bytes:
    """Optimizer state of other names, shapes or dtypes."""
    state = optimizer_state(engine.optimizer, engine.parameters)
    name = random.choice(sorted(state))
    tensor = state.pop(name)
    kind = random.randrange(5)
    if kind == 0:
        state[random.choice(("weight", "weight.", ".", "weight.x", "bias.step.step", *STRINGS[:8]))] = tensor
    elif kind == 1:
        dtypes = (torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64)
        state[name] = tensor.to(random.choice(dtypes))
    elif kind == 2:
        state[name] = torch.ones(random.choice(((), (0,), (1,), (4, 2), (2, 4, 1), (0, 5))))
    elif kind == 3:
        state[name] = tensor * random.choice((float("nan"), float("inf"), -1e30))
    return save(state)


_FACTS = {
    "times_s": [0.0, 0.125, 0.25],
    "indices": [0, 1, 2],
    "codec": "h264",
    "container": "mp4",
    "source_frames": 30,
    "source_fps": 24.0,
    "source_duration_s": 1.25,
    "display_size": "64x48",
    "reader": "pyav",
    "padded": False,
}


def _inspect(folder: Path) -> Case:
    boxes = [CacheBox(folder / "tar"), ZarrBox(folder / "zarr")]
    data_root = folder / "videos"
    data_root.mkdir()
    (data_root / "0.mp4").write_bytes(b"not a video")
    out = folder / "made" / "out"  # a writer makes the name of its folder's parent durable, too
    out.parent.mkdir()

    def changed(box: CacheBox, random: Random) -> dict[str, bytes]:
        if random.random() < 0.3:
            rows = [json.loads(text) for text in box.files[SAMPLES_FILE].split(b"\n")[:-1]]
            row = random.choice(rows)
            name = random.choice(
                ("caption", "source", "window", "fps", "frames", "height", "width", "sha256")
            )
            row[name] = random.choice((*STRINGS, *NUMBERS))
            return box.with_table(SAMPLES_FILE, b"".join(_line(row) + b"\n" for row in rows))
        name = random.choice([name for name in box.indexes if name.startswith(LATENTS)])
        _, entries = box.entries(name)
        _, parts = random.choice(entries)
        if random.random() < 0.3 and not isinstance(box, ZarrBox):
            parts[0] = _other_tensors(parts[0], random)
        else:
            value = json.loads(parts[1])
            facts = value["facts"] if isinstance(box, ZarrBox) else value
            more = mutate_json(_FACTS, random) if random.random() < 0.8 else {}
            facts |= more if isinstance(more, dict) else {}
            parts[1] = _line(value) if random.random() < 0.9 else line(value, random)
        return box.with_entries(name, entries)

    def case(random: Random) -> None:
        box = random.choice(boxes)
        root = box.lay_out(changed(box, random))
        if random.random() < 0.3:
            if out.exists():
                clear(out)
            export_shards(root, out, backend=random.choice(("webdataset", "zarr")), limit=3)
            CacheReader(out)
            return
        reader = CacheReader(root)
        pictures = random.random() < 0.5
        look = look_at(reader, pictures, data_root) if random.random() < 0.8 else None
        report = gather(reader, look)
        as_text(report).encode()
        gallery(report).encode()
        json.dumps(report, ensure_ascii=False, allow_nan=False).encode()

    return case


def _line(value: Any) -> bytes:
    try:
        return canonical_json(value).encode()
    except (ValueError, RecursionError):
        return careless(value)


def _other_tensors(data: bytes, random: Random) -> bytes:
    """Tensors that are sound, and not those of a latent."""
    kind = random.randrange(5)
    if kind == 0:
        return spoil_tensors(data, random)
    shapes = (
        (0,),
        (1,),
        (8, 3, 4),
        (8, 0, 4, 6),
        (1, 1, 1, 1),
        (2, 1, 1, 1),
        (3, 1, 5000, 1),
        (7, 2, 1, 3),
        (),
    )
    name = random.choice(("moments", "moments", "moments", "moments_8bit", "moments_8bit", "latents", ""))
    tensor = torch.full(random.choice(shapes), random.choice((0.0, 1.0, float("nan"), float("inf"), 3e38)))
    if name == "moments_8bit":
        tensor = torch.zeros(tensor.shape, dtype=torch.uint8)
    return save({name: tensor})
