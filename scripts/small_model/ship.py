"""Put what make.py has trained into the package: every byte once, no more than 25 MB.

    python scripts/small_model/ship.py WORK [--out cogcache/small/weights]

Takes WORK/models and WORK/shared/reached.json. What is there is replaced, but for the model card; where there is none
it is the package's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from cogcache.small.architecture import KINDS
from cogcache.small.shipped import MODEL_CARD, SHARED, WEIGHTS

MOST_BYTES = 25_000_000
FORGOTTEN = ("_name_or_path",)
"""Keys of configs that tell where a model once lay, not what it is."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    size = ship(given.work, given.out)
    print(f"{given.out}: {size / 1e6:.1f} MB")


def ship(work: Path, out: Path) -> int:
    """Write the folder that :func:`cogcache.small.small_model` reads; its bytes.

    Raises:
        SystemExit: if the models do not share their weights, are not in bfloat16, or are too large.
    """
    files = {kind: contents(work / "models" / kind) for kind in KINDS}
    chosen = {"reached.json": (work / "shared" / "reached.json").read_bytes()}
    for kind, found in files.items():
        for name, data in found.items():
            once = name.split("/")[0] in SHARED and all(other.get(name) == data for other in files.values())
            chosen[name if once else f"{kind}/{name}"] = data
    check(chosen)
    replace(out, chosen)
    return sum(map(len, chosen.values()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a model by its name in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): cleaned(path) for path in paths}


def cleaned(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    kept = {name: value for name, value in config.items() if name not in FORGOTTEN}
    return (json.dumps(kept, indent=2) + "\n").encode()


def check(files: dict[str, bytes]) -> None:
    twice = [name for name in files if any(f"/{part}/" in name for part in SHARED)]
    if heavy := [name for name in twice if not name.endswith(".json")]:
        raise SystemExit(f"not the same in all models: {', '.join(heavy)}")
    for name, data in files.items():
        if name.endswith(".safetensors") and (wrong := dtypes(data) - {"BF16"}):
            raise SystemExit(f"{name} holds {', '.join(sorted(wrong))}, not BF16")
    size = sum(map(len, files.values()))
    if size > MOST_BYTES:
        raise SystemExit(f"{size / 1e6:.1f} MB is more than {MOST_BYTES / 1e6:.0f} MB")


def dtypes(data: bytes) -> set[str]:
    """Of the tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {facts["dtype"] for name, facts in header.items() if name != "__metadata__"}


def replace(out: Path, files: dict[str, bytes]) -> None:
    """All but the model card is new."""
    for old in out.iterdir() if out.exists() else ():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != MODEL_CARD:
            old.unlink()
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    if not (out / MODEL_CARD).exists():
        shutil.copy(WEIGHTS / MODEL_CARD, out)


if __name__ == "__main__":
    main()
