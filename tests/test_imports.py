"""The direction of the arrows: leaves -> cache -> {precompute, train, infer} -> cli, demo, bench, planner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cogcache

PACKAGE = Path(cogcache.__file__).parent
STAGES = ("precompute", "train", "infer", "inspect")
TOP = ("cli", "cache_commands", "demo", "bench", "planner", "__main__")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: dotted names, with those of ``from a import b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {module_name(path): imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}


def part(name: str) -> str:
    """``train`` for ``cogcache.train.loop``, ``cogcache`` for the package itself."""
    return [*name.split("."), "", ""][1] or "cogcache"


def parts_used(module: str) -> set[str]:
    return {part(name) for name in MODULES[module] if name.split(".")[0] == "cogcache"}


def test_the_test_sees_the_package() -> None:
    assert len(MODULES) > 60
    top = ("cogcache.cli", "cogcache.cache_commands", "cogcache.demo.run")
    assert set(STAGES) <= set().union(*map(parts_used, top))
    assert "cache" in parts_used("cogcache.train.stage")


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    used, mine = parts_used(module), part(module)
    if mine in TOP:
        return
    assert not used & set(TOP), "only the command line knows the command line"
    allowed = {mine} if mine in STAGES else set()
    assert used & set(STAGES) <= allowed
    if mine not in STAGES and mine not in ("cache", "cogcache"):
        assert "cache" not in used or mine == "cache", "leaves do not know the cache"


def test_training_reaches_no_encoder_and_no_video() -> None:
    """All of ``cogcache.train``, really imported: what it brings along through other libraries counts too."""
    names = [name for name in MODULES if part(name) == "train"]
    code = "import sys\n" + "".join(f"import {name}\n" for name in names)
    code += "print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "cogcache.train.loop" in loaded
    assert not {
        name for name in loaded if part(name) in ("precompute", "infer", "demo") and "cogcache" in name
    }
    for unwanted in ("av", "decord", "imageio", "imageio_ffmpeg", "cv2"):
        assert unwanted not in loaded
    encoders = (
        "diffusers.models.autoencoders.",
        "transformers.models.t5.modeling",
        "diffusers.pipelines.cogv",
    )
    assert not [name for name in loaded if name.startswith(encoders)]


def test_nothing_is_unpickled() -> None:
    for module, names in MODULES.items():
        assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, module
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.save",
                "eval",
                "exec",
            ):
                raise AssertionError(f"{path.name}:{node.lineno}")
