"""Before the first step: weights are read as diffusers reads them, compilations are kept, and parts are timed.

Mutations tried, each caught: bytes read from the wrong place; no cast; parameters drawn at random; a short read taken
for a whole one; pieces in the wrong place; files outside of the folder read; the user's own compile cache replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor

from cogcache.config import TrainConfig
from cogcache.errors import ModelError
from cogcache.tiny import FAMILIES, Family
from cogcache.train import stage, startup, train, weights
from cogcache.train.model import load_transformer
from cogcache.train.startup import Startup, keep_compilations
from cogcache.train.weights import read_weights

Models = Callable[[Family], Path]
Settings = Callable[..., TrainConfig]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def from_pretrained(root: Path, dtype: torch.dtype) -> Any:
    return CogVideoXTransformer3DModel.from_pretrained(
        root, subfolder="transformer", torch_dtype=dtype, local_files_only=True
    )


def content(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_same(model: Any, other: Any) -> None:
    ours, theirs = content(model), content(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.device) == (theirs[name].dtype, theirs[name].device), name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def sharded(tiny_models: Models, tmp_path: Path) -> Path:
    """A model folder whose transformer lies in several files."""
    root = shutil.copytree(tiny_models("5b"), tmp_path / "sharded")
    shutil.rmtree(root / "transformer")
    from_pretrained(tiny_models("5b"), torch.float32).save_pretrained(
        root / "transformer", max_shard_size="200KB"
    )
    assert len(list((root / "transformer").glob("*.safetensors"))) > 2
    return root


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformer_is_that_of_diffusers(
    family: Family, dtype: torch.dtype, tiny_models: Models
) -> None:
    root, before = tiny_models(family), torch.get_rng_state()
    loaded: Any = load_transformer(root, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    stock = from_pretrained(root, dtype)
    check_same(loaded, stock)
    assert {**loaded.config, "_name_or_path": ""} == {**stock.config, "_name_or_path": ""}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_several_files(sharded: Path) -> None:
    check_same(load_transformer(sharded, torch.float32), from_pretrained(sharded, torch.float32))


def test_bytes_on_their_way_to_a_gpu(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through small buffers, which a CPU does not need."""
    plain = read_weights(sharded / "transformer", torch.float32)
    monkeypatch.setattr(weights, "_BUFFER", 1000)
    make = weights._Reader.__init__

    def staged(self: Any, *args: Any) -> None:
        make(self, *args)
        self._staged = True

    monkeypatch.setattr(weights._Reader, "__init__", staged)
    again = read_weights(sharded / "transformer", torch.float32)
    assert plain.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())


def edit_index(root: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = root / "transformer" / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def cut(root: Path) -> None:
    path = max((root / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def outside(root: Path) -> None:
    shutil.copy(max((root / "transformer").glob("*.safetensors")), root / "more.safetensors")
    edit_index(root, lambda places: places.update(x="../more.safetensors"))


def narrow(root: Path) -> None:
    path = root / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_embed_dim": 32}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged, or the file is cut short"),
        (narrow, "another shape"),
        (lambda root: max((root / "transformer").glob("*.safetensors")).unlink(), "No such file"),
        (outside, "or files elsewhere"),
        (lambda root: edit_index(root, dict.clear), "no files"),
        (lambda root: (root / "transformer" / INDEX).unlink(), "No such file"),
    ],
)
def test_damage_is_refused(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(sharded)
    with pytest.raises(ModelError, match=message):
        load_transformer(sharded, torch.float32)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = weights.read_tensor_header

    def shrinking(path: Path) -> Any:
        found = header(path)
        os.truncate(path, path.stat().st_size - 100)
        return found

    monkeypatch.setattr(weights, "read_tensor_header", shrinking)
    with pytest.raises(ModelError, match="cut short"):
        load_transformer(sharded, torch.float32)


@pytest.fixture
def _no_compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.usefixtures("_no_compile_cache")
def test_compilations_are_kept_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep_compilations()
    kept = tmp_path / "home" / "cogcache" / "compile"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)
    assert kept.is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compilations()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


@pytest.mark.usefixtures("_no_compile_cache")
def test_a_folder_that_torch_has_named_itself_is_no_choice(tmp_path: Path) -> None:
    """Importing diffusers makes torch do that, before anybody knows whether the run compiles."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    own = cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == own
    keep_compilations()
    assert cache_dir() == str(tmp_path / "home" / "cogcache" / "compile")


@pytest.mark.usefixtures("_no_compile_cache")
def test_without_a_home_torch_decides(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    keep_compilations()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("compiles", [False, True])
def test_only_what_compiles_needs_a_place(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, compiles: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(stage, "keep_compilations", lambda: calls.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    train(settings(memory="small", compile=compiles, gradient_checkpointing=True, steps=1), begun=100.0)
    assert len(calls) == compiles
    (ready,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Ready in 1")]
    assert "imports 1" in ready
    assert all(part in ready for part in ("data", "GPU", "weights", "placing", "rest"))


def test_parts_of_a_start_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 13.0, 14.0, 15.0, 15.5, 16.0, 17.0])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(now))
    start = Startup(3.0)
    for name in ("model", "data", "model"):
        with start.part(name):
            pass
    assert start.line() == "Ready in 10.0 s: imports 3.0, model 2.5, data 1.0, rest 3.5."
