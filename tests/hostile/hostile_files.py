"""Hostile files that are no cache: lists and captions, LoRAs, settings, configs of models, pictures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from hostile_cache import careless, clear, spoil_tensors
from hostile_kit import Case, Target
from hostile_mutations import NUMBERS, STRINGS, mutate_bytes, mutate_json, mutate_text, spoil_json

from cogcache.config import EncodeConfig, ExtractImagesConfig, InferConfig, TrainConfig
from cogcache.config_io import load_config
from cogcache.finetuned import read_finetuned
from cogcache.geometry import Size
from cogcache.infer.plan import plan_inference
from cogcache.lora import read_lora_header
from cogcache.lora.weights import read_lora
from cogcache.pictures import load_picture
from cogcache.precompute.clips import plan_clips
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.dry_run import plan_run
from cogcache.precompute.settings import decide
from cogcache.precompute.validation import plan_validation
from cogcache.tiny import build_tiny_model
from cogcache.train.adapter import continue_from
from cogcache.train.model import load_scheduler
from cogcache.variants import read_variant, weights_dtype

__all__ = ["files_targets"]


def files_targets(folder: Path) -> list[Target]:
    """All kinds of input that are files of the user's; ``folder`` is theirs to write in."""
    model = build_tiny_model(folder / "model", "5b")
    hashes = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()  # remembered hashes of files
    work = folder / "work"
    work.mkdir()
    cases = (_lists, _lora, _settings, _model, _pictures)
    return [Target(case.__name__.strip("_"), case(work, model), (folder, hashes)) for case in cases]


_NAMES = (
    "a.mp4",
    "b c.mp4",
    "folder/c.mp4",
    "gone.mp4",
    "folder",
    ".",
    "e\u0301.mp4",
    "link.mp4",
    "out/passwd",
    "loop/a.mp4",
)


def _lists(work: Path, model: Path) -> Case:
    root = work / "data"
    config: dict[str, Any] = {"model": str(model), "frames": 9, "size": "32x48", "device": "cpu"}

    def fresh(links: bool) -> None:
        root.mkdir(exist_ok=True)
        clear(root)
        (root / "folder").mkdir()
        for name in ("a.mp4", "b c.mp4", "folder/c.mp4", "e\u0301.mp4"):
            (root / name).write_bytes(b"not a video")
        for name, target in (("link.mp4", "/etc/passwd"), ("out", "/etc"), ("loop", ".")) if links else ():
            (root / name).symlink_to(target)

    def case(random: Random) -> None:
        fresh(random.random() < 0.3)
        kind, write = random.choice(tuple(_LAYOUTS.items()))
        write(root, random)
        kind = random.choice((kind.rstrip("2"), "auto"))
        settings = EncodeConfig(data_root=root, dataset=kind, shards=work / "none", **config)
        if kind == "lists" and random.random() < 0.2:
            prompts = root / "prompts.txt"
            plan_validation(decide(settings.model_copy(update={"validation_prompts": prompts})))
        elif random.random() < 0.5:
            items = find_clips(root, kind, allow_outside=False)
            _stay_inside(items, root)
            plan_clips(items, decide(settings))
        else:
            plan_run(settings)

    return case


def _stay_inside(items: Any, root: Path) -> None:
    outside = [item.path for item in items if not item.path.resolve().is_relative_to(root.resolve())]
    assert not outside, outside


def _name(random: Random) -> str:
    return random.choice(("a.mp4", "a.mp4", *_NAMES)) if random.random() < 0.9 else random.choice(STRINGS)


def _caption(random: Random) -> str:
    return random.choice(STRINGS) if random.random() < 0.4 else "a cat"


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text_lists(root: Path, random: Random) -> None:
    count = random.choice((1, 2, 5))
    for name, make in (("videos.txt", _name), ("prompts.txt", _caption), ("images.txt", _name)):
        if name == "images.txt" and random.random() < 0.7:
            continue
        data = b"".join(_raw(make(random)) + b"\n" for _ in range(count))
        (root / name).write_bytes(mutate_bytes(data, random, 1) if random.random() < 0.2 else data)


def _metadata_lines(root: Path, random: Random) -> None:
    rows = [
        {"file_name": "a.mp4", "text": "a cat"},
        {"file_name": "b c.mp4", "text": "b", "image": "a.mp4", "n": 1},
    ]
    lines = []
    for row in rows:
        kind = random.randrange(4)
        if kind == 0:
            lines.append(spoil_json(careless(row), random))
        elif kind == 1:
            row = {name: _name(random) if name != "text" else _caption(random) for name in row}
            lines.append(json.dumps(row).encode())
        else:
            lines.append(json.dumps(_shallow(mutate_json(row, random))).encode())
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def _shallow(value: Any) -> Any:
    """``value`` if Python's own encoder takes it."""
    try:
        json.dumps(value)
    except RecursionError:
        return None
    return value


def _metadata_table(root: Path, random: Random) -> None:
    text = f'file_name,text,image\na.mp4,"a ""cat""",\n{_name(random)},{_caption(random)},{_name(random)}\n'
    text = mutate_text(text, random)
    if random.random() < 0.05:
        text += '"' + "x" * 200_000
    (root / "metadata.csv").write_bytes(_raw(text))


def _sidecars(root: Path, random: Random) -> None:
    for name in ("a.txt", "b c.txt", "folder/c.txt", "e\u0301.txt"):
        data = _raw(_caption(random))
        (root / name).write_bytes(mutate_bytes(data, random, 1) if random.random() < 0.3 else data)
    strange = (
        os.fsencode(root)
        + b"/"
        + random.choice((b"\xff\xfe.mp4", b"a\nb.mp4", b"-rf.mp4", b"\xed\xa0\x80.txt", b"~.mp4"))
    )
    with open(strange, "wb") as stream:
        stream.write(b"x")
    if random.random() < 0.3:
        (root / "b c.txt").unlink()
        (root / "b c.txt").symlink_to(random.choice(("/etc/passwd", "a.txt", "b c.txt", "/dev/zero")))


_LAYOUTS = {
    "lists": _text_lists,
    "metadata": _metadata_lines,
    "metadata2": _metadata_table,
    "sidecar": _sidecars,
}

_LAYER = "transformer_blocks.0.attn1.to_q"
_PATTERNS = (
    "(a+)+$",
    "(x|x)*y",
    ".*.*.*.*.*.*z",
    "[",
    "(?P<a>",
    "\\",
    "to_q",
    "^" + "a?" * 30 + "a" * 30,
    "(.+)+\\d{9}",
    "",
)


def _lora(work: Path, model: Path) -> Case:
    import torch
    from safetensors.torch import save_file

    folder = work / "loras"
    folder.mkdir()
    variant = read_variant(model)
    width = variant.num_attention_heads * variant.attention_head_dim
    down, up = torch.ones(2, width), torch.ones(width, 2)
    metadata = {"r": 2, "lora_alpha": 1.0, "target_modules": ["to_q"], "alpha_pattern": {"to_q": 2.0}}
    provenance = {
        "base_model": str(model),
        "variant": variant.model_dump(mode="json"),
        "frames": 9,
        "size": "32x48",
    }
    provenance |= {"fps": 8.0, "fingerprint": "x"}
    names = {f"transformer.{_LAYER}.lora_A.weight": down, f"transformer.{_LAYER}.lora_B.weight": up}
    kohya = f"lora_unet__{_LAYER.replace('.', '_')}"
    other = {
        f"{kohya}.lora_down.weight": down,
        f"{kohya}.lora_up.weight": up,
        f"{kohya}.alpha": torch.tensor(1.0),
    }
    save_file(names, folder / "names.safetensors")
    save_file(other, folder / "other.safetensors")
    made = [(folder / name).read_bytes() for name in ("names.safetensors", "other.safetensors")]
    path = folder / "case.safetensors"

    def with_metadata(random: Random) -> bytes:
        length = int.from_bytes(made[0][:8], "little")
        header = json.loads(made[0][8 : 8 + length])
        changed = mutate_json(metadata, random)
        if random.random() < 0.3:
            changed = {
                **metadata,
                "alpha_pattern": {random.choice(_PATTERNS): random.choice((1.0, *NUMBERS))},
            }
        words = careless(changed).decode("utf-8", "replace")
        said = careless(mutate_json(provenance, random) if random.random() < 0.7 else provenance)
        header["__metadata__"] = {"lora_adapter_metadata": words, "cogcache": said.decode("utf-8", "replace")}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + made[0][8 + length :]

    def case(random: Random) -> None:
        kind = random.randrange(3)
        data = with_metadata(random) if kind == 0 else spoil_tensors(random.choice(made), random)
        path.write_bytes(data)
        use = random.randrange(4)
        if use == 0:
            plan_inference(InferConfig(lora=path, model=str(model), prompt=["x"], output=work / "x.mp4"))
        elif use == 1:
            config = TrainConfig(shards=work, init_lora=path)
            continue_from(config, variant, model, "the model")
        else:
            read_lora(read_lora_header(path)).folded()

    return case


_YAML = (
    *(
        "[" * 5000,
        "a: " * 50,
        "? [a]\n: b\n",
        "!!python/object/apply:os.system ['touch x']",
        "!!python/name:os.system",
    ),
    *(
        "!!int ''",
        "!!bool maybe",
        "!!timestamp soon",
        "!!float abc",
        "!!binary '*'",
        "!!set {a}",
        "!!omap [a]",
        "2001-99-99",
    ),
    *(
        "&a [*a]",
        "*gone",
        "<<: [1]",
        "<<: {a: 1}",
        "{<<: &x {<<: *x}}",
        "1:99:99",
        "0b",
        "0x",
        "-.inf",
        ".nan",
        "1e999",
    ),
    *(
        "9" * 5000,
        "\t- a",
        "--- a\n--- b\n",
        "%YAML 9.9\n---\na: 1\n",
        "- " * 3000 + "a",
        "'" + "\ud800",
        "\x00",
        "\x85",
    ),
    *(
        "{a: 1, a: 2}",
        "a: !!null x",
        "!<x> y",
        "|\n  a",
        ">9\n a",
        "{" * 3000,
        "!!str [a]",
        "!!map [a]",
        "!!seq {a: 1}",
    ),
)
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _settings(work: Path, _: Path) -> Case:
    path = work / "config.yaml"
    kinds = (EncodeConfig, TrainConfig, InferConfig, ExtractImagesConfig)

    def case(random: Random) -> None:
        kind = random.choice(kinds)
        lines = []
        for _ in range(random.choice((1, 2))):
            name = random.choice((*kind.model_fields, "unknown", "data-root"))
            value = random.choice((*_YAML, *map(str, NUMBERS), *STRINGS, "x", "[1, 2]", "{a: 1}"))
            lines.append(f"{name}: {value}")
        if random.random() < 0.05:
            lines.append(
                _BOMB.replace("a:", f"{random.choice(list(kind.model_fields))}:", 1) + "frames: *i\n"
            )
        if random.random() < 0.1:
            lines = [random.choice(_YAML)]
        data = _raw("\n".join(lines))
        path.write_bytes(mutate_bytes(data, random, 1) if random.random() < 0.3 else data)
        flags = {"data_root": work, "model": "x", "shards": work, "prompt": ["x"]}
        given = {name: value for name, value in flags.items() if name in kind.model_fields}
        load_config(kind, given if random.random() < 0.7 else {}, path)

    return case


_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def _model(work: Path, model: Path) -> Case:
    root = work / "other-model"
    values = {name: json.loads((model / name).read_text()) for name in _CONFIGS}
    weights = next((model / "vae").glob("*.safetensors")).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    weights = weights[: 8 + length] + bytes(64)
    for name in _CONFIGS:
        (root / name).parent.mkdir(parents=True)
    provenance = {"base_model": "x/y", "frames": 9, "size": "32x48", "fps": 8.0}

    def case(random: Random) -> None:
        chosen = random.choice(_CONFIGS)
        for name, value in values.items():
            data = json.dumps(value).encode()
            if name == chosen:
                data = (
                    spoil_json(data, random)
                    if random.random() < 0.3
                    else careless(mutate_json(value, random))
                )
            (root / name).write_bytes(data)
        (root / "vae" / "x.safetensors").write_bytes(spoil_tensors(weights, random))
        said = (
            spoil_json(json.dumps(provenance).encode(), random)
            if random.random() < 0.5
            else careless(mutate_json(provenance, random))
        )
        (root / "cogcache.json").write_bytes(said)
        work = random.choice((_facts, _facts, weights_of, load_scheduler, read_finetuned))
        work(root)

    def weights_of(root: Path) -> None:
        weights_dtype(root / "vae")

    return case


def _facts(root: Path) -> None:
    """Everything that is derived from a model's configs before it is loaded."""
    variant = read_variant(root)
    variant.check_clip(variant.sample_frames, variant.default_size)
    variant.latent_shape(variant.sample_frames, variant.default_size)


def _pictures(work: Path, _: Path) -> Case:
    from PIL import Image

    path = work / "picture"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    made = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "DDS"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        made.append(stream.getvalue())

    def case(random: Random) -> None:
        path.write_bytes(mutate_bytes(random.choice(made), random))
        load_picture(path, Size(32, 48))

    return case
