"""Finding checkpoints, precisions and devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from cogcache.errors import ConfigError, ModelError
from cogcache.models import loading, pick_device, resolve_model, torch_dtype
from cogcache.tiny import Family


def test_local_folders(
    tiny_models: Callable[[Family], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_models("5b")
    assert resolve_model(str(root), ["vae", "tokenizer"]) == root
    monkeypatch.chdir(root.parent)
    assert resolve_model("5b", ["vae"]) == Path("5b")
    monkeypatch.setenv("HOME", str(root.parent))
    assert resolve_model("~/5b", ["vae"]) == root
    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelError, match="has no folder text_encoder, tokenizer"):
        resolve_model(str(tmp_path), ["vae", "text_encoder", "tokenizer"])


@pytest.mark.parametrize(
    "name", ["/no/where", "./no/where", "../x", "~/nowhere", "a/b/c", "nowhere", "no where"]
)
def test_what_looks_local_is_never_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="there is no model folder"):
        resolve_model(name, ["vae"])


def test_only_what_is_needed_is_downloaded(
    tiny_models: Callable[[Family], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_models("5b"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("someone/model", ["vae", "text_encoder", "tokenizer"]) == tiny_models("5b")
    ((name, patterns),) = asked
    assert name == "someone/model"
    assert {"vae/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*.model", "*/*.json"} <= set(
        patterns
    )
    assert not [p for p in patterns if p.startswith("transformer/") or p.endswith((".bin", ".py", "*/*"))]


def test_trouble_with_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise RuntimeError("404 Client Error\n\nmany\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="could not be fetched from the hub: 404 Client Error") as raised:
        resolve_model("someone/model", ["vae"])
    assert raised.value.message.endswith("404 Client Error")


def test_dtypes() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    for name in ("int8", "float64", "auto", ""):
        with pytest.raises(ConfigError, match="not a usable precision"):
            torch_dtype(name)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("toaster", "meta", "cuda:99", "cpu:x", "", "mps"):
        with pytest.raises(ConfigError, match="device"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


def test_loading_errors_are_one_short_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelError, match=r"the VAE in .* cannot be loaded: KeyError: 'x'") as raised,
        loading("VAE", tmp_path),
    ):
        raise KeyError("x")
    assert "\n" not in raised.value.message
    with pytest.raises(ModelError) as raised, loading("VAE", tmp_path):
        raise ValueError("line\n" * 500)
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 500
    with pytest.raises(KeyboardInterrupt), loading("VAE", tmp_path):
        raise KeyboardInterrupt
