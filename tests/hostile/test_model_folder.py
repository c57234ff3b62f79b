"""A checkpoint runs no code: files of Python and pickles in it stay files, whatever its configs ask for."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.config import InferConfig
from cogcache.decode import Decoder
from cogcache.errors import CogcacheError, ModelError
from cogcache.geometry import Size
from cogcache.infer.pipeline import load_pipeline
from cogcache.infer.plan import plan_inference
from cogcache.models import check_model_index, resolve_model
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.tiny import Family
from cogcache.train.model import load_scheduler, load_transformer

PACKAGE = Path(__file__).parents[2] / "cogcache"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
EVIL = ["evil", "Evil"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the libraries warn of settings that they do not know
]


class Marker:
    """Where planted code leaves its trace; the file is also what unpickling the pickle would write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    @property
    def code(self) -> str:
        return f"import os\nos.makedirs({str(self.path)!r}, exist_ok=True)\n\n\nclass Evil:\n    pass\n"


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    return Marker(tmp_path / "code was run")


@pytest.fixture
def model(tiny_models: Callable[[Family], Path], tmp_path: Path, marker: Marker) -> Path:
    """A whole checkpoint with code and pickles lying in every folder."""
    root = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    for folder in (root, *(root / part for part in PARTS)):
        for name in (
            "evil.py",
            "__init__.py",
            "pipeline.py",
            "modeling_t5.py",
            "tokenization_t5.py",
            "conftest.py",
        ):
            (folder / name).write_text(marker.code)
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "tokenizer.pkl"):
            (folder / name).write_bytes(pickle.dumps(marker))
    return root


def change(root: Path, name: str, **values: Any) -> None:
    path = root / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ask_for_code(root: Path) -> None:
    """``auto_map`` and the like, as models with code of their own have them."""
    names = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    auto_map: dict[str, Any] = dict.fromkeys(names, "evil.Evil") | {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"]
    }
    for part in PARTS:
        for path in (root / part).glob("*config.json"):
            change(
                root, f"{part}/{path.name}", auto_map=auto_map, custom_pipelines={"x": "evil"}, _module="evil"
            )


def without_weights(root: Path) -> None:
    """Only pickles are left."""
    for path in root.glob("*/*.safetensors"):
        path.unlink()


def strange_tokenizer(root: Path) -> None:
    change(
        root,
        "tokenizer/tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": EVIL},
    )


def sharded_into_a_pickle(root: Path) -> None:
    """The index of a part names files outside of it and pickles."""
    without_weights(root)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = {
            "weight_map": {"x": "../../evil.bin", "y": "pytorch_model.bin"},
            "metadata": {"total_size": 1},
        }
        (root / part / f"{stem}.safetensors.index.json").write_text(json.dumps(weights))


def pickles_by_another_name(root: Path) -> None:
    for path in root.glob("*/*.safetensors"):
        path.write_bytes((root / "pytorch_model.bin").read_bytes())


def load_everything(root: Path, tmp_path: Path) -> list[str]:
    """Every way in which a stage loads a part of a checkpoint; gives the messages of those that refuse."""
    cpu, wide = torch.device("cpu"), torch.float32
    config = InferConfig(model=str(root), prompt=["x"], output=tmp_path / "x.mp4", device="cpu")
    ways: list[Callable[[], object]] = [
        lambda: resolve_model(str(root), PARTS),
        lambda: FrozenVae(root, "float32", tiled=False, device=cpu),
        lambda: FrozenText(root, "float32", 8, cpu),
        lambda: load_transformer(root, wide),
        lambda: load_scheduler(root),
        lambda: Decoder(root, wide, cpu, Size(32, 48)),
        lambda: load_pipeline(plan_inference(config)),
    ]
    refused = []
    for way in ways:
        try:
            way()
        except CogcacheError as error:
            refused.append(str(error))
    return refused


WISHES: list[Callable[[Path], None]] = [
    ask_for_code,
    strange_tokenizer,
    without_weights,
    sharded_into_a_pickle,
    pickles_by_another_name,
    lambda root: change(root, "model_index.json", _class_name=EVIL),
    *(
        (lambda root, part=part: change(root, "model_index.json", **{part: EVIL}))
        for part in (*PARTS, "something_else")
    ),
]


@pytest.mark.parametrize("wish", WISHES)
def test_no_code_of_a_checkpoint_is_run(
    wish: Callable[[Path], None], model: Path, marker: Marker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wish(model)
    refused = load_everything(model, tmp_path)
    assert not marker.path.exists()
    assert all(refused)


def test_the_planted_code_would_leave_its_mark(model: Path, marker: Marker) -> None:
    pickle.loads((model / "pytorch_model.bin").read_bytes())  # noqa: S301
    assert marker.path.exists()
    marker.path.rmdir()
    exec((model / "evil.py").read_text(), {})
    assert marker.path.exists()


@pytest.mark.parametrize("part", ["_class_name", "vae", "something_else"])
def test_a_class_of_the_checkpoints_own_is_refused_before_the_libraries_see_it(
    part: str, model: Path
) -> None:
    check_model_index(model)
    change(model, "model_index.json", **{part: EVIL})
    with pytest.raises(ModelError, match=f"wants code of its own for {part}"):
        check_model_index(model)


def test_a_checkpoint_with_code_beside_it_loads(model: Path, tmp_path: Path) -> None:
    """The files are not the reason for a refusal: what is whole beside them is used."""
    assert load_everything(model, tmp_path) == []


def test_nothing_in_the_package_could_run_or_unpickle_what_is_in_a_file() -> None:
    source = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    calls = re.compile(
        r"trust_remote_code\s*=\s*(?!False)|(?<!safetensors\.)torch\.load\(|\bpickle\.|import pickle|allow_pickle"
        r"|yaml\.(load|unsafe|full)"
        r"|joblib|dill\b|(?<![\w.])(eval|exec)\(|weights_only|use_safetensors\s*=\s*(?!True)|custom_pipeline"
    )
    assert {path.name: found[0] for path, text in source.items() if (found := calls.search(text))} == {}


def test_weights_are_loaded_from_safetensors_alone() -> None:
    calls = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    unsafe = []
    for call in calls:
        given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        no_weights = ast.unparse(call.func).split(".")[0] in (
            "AutoTokenizer",
            "kind",
        )  # kind: a scheduler's class
        if not (given.get("use_safetensors") is True or no_weights) or given.get("trust_remote_code"):
            unsafe.append(ast.unparse(call))
    assert unsafe == []
    assert len(calls) >= 8
