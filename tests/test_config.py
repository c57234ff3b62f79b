"""One declaration of each setting: flags, YAML, help and the saved record all follow it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from rich.text import Text

from cogcache.config import EncodeConfig, InferConfig, TrainConfig
from cogcache.config_io import load_config, save_config
from cogcache.errors import ConfigError, StorageError
from cogcache.flags import config_command

ROOT = Path(__file__).parents[1]
NEEDED: dict[type[BaseModel], dict[str, Any]] = {
    EncodeConfig: {"data_root": "clips", "model": "some/model"},
    TrainConfig: {"shards": "shards/clips"},
    InferConfig: {"lora": "lora.safetensors", "prompt": ["a rabbit"]},
}
COMMANDS = {"encode": EncodeConfig, "train": TrainConfig, "infer": InferConfig}
FIELDS = [(kind, name) for kind in NEEDED for name in kind.model_fields]


def other_value(kind: type[BaseModel], name: str) -> Any:
    """A valid value of a field that is not its default."""
    field = kind.model_fields[name]
    special = {
        "fps": "12" if kind is EncodeConfig else 12.0,
        "report_to": ["wandb"],
        "lora_dropout": 0.5,
        "rank_pattern": ["to_q=4", "to_k=4:2.0"],
        "image": [Path("one.png"), Path("two.png")],
        "video": [Path("one.mp4")],
    }
    if name in special:
        return special[name]
    annotation = field.annotation
    while get_origin(annotation) is not Literal and get_args(annotation):
        if get_origin(annotation) is list:
            return ["one", "two"]
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != field.default)
    if annotation is bool:
        return not field.default
    if annotation is int:
        return (field.default or 1) + 2
    if annotation is float:
        return (field.default or 0.5) * 0.5 if field.default != 1.0 else 2.0
    return Path("other") if annotation is Path else "other"


def flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [part for item in (value if isinstance(value, list) else [value]) for part in (flag, str(item))]


def parse(kind: type[BaseModel], arguments: list[str]) -> BaseModel:
    import typer

    found: list[BaseModel] = []
    app = typer.Typer()
    app.command()(config_command(kind, found.append, "Test."))
    app(arguments, standalone_mode=False)
    (config,) = found
    return config


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{k.__name__}-{n}" for k, n in FIELDS])
def test_every_setting_is_a_flag_and_a_yaml_key(kind: type[BaseModel], name: str, tmp_path: Path) -> None:
    value = other_value(kind, name)
    needed = {key: item for key, item in NEEDED[kind].items() if key != name}
    if kind is InferConfig and name == "lora":
        needed["model"] = "some/model"
    if name == "lora_alpha":
        needed["lora"] = "some.safetensors"
    if name == "validate_at_start":
        needed["validate_every"] = 1
    expected = kind(**needed, **{name: value})
    default = kind(**{**NEEDED[kind], **needed})
    assert getattr(expected, name) != getattr(default, name)
    base = [part for key, item in needed.items() for part in flags(key, item)]
    assert parse(kind, base + flags(name, value)) == expected
    plain = str(value) if isinstance(value, Path) else value
    if isinstance(plain, list):
        plain = [str(item) for item in plain]
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**needed, name.replace("_", "-"): plain}), "utf-8")
    assert parse(kind, ["--config", str(file)]) == expected
    save_config(expected, tmp_path / "saved.yaml")
    assert load_config(kind, {}, tmp_path / "saved.yaml") == expected


@pytest.mark.parametrize("kind", list(NEEDED))
def test_flags_win_over_yaml_and_yaml_over_defaults(kind: type[BaseModel], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    key = "workers" if "workers" in kind.model_fields else "steps"
    file.write_text(yaml.safe_dump({**NEEDED[kind], key: 7, "device": "cuda:3"}), "utf-8")
    config: Any = parse(kind, ["--config", str(file), f"--{key}", "5"])
    assert getattr(config, key) == 5
    assert config.device == "cuda:3"


def test_a_flag_can_take_back_what_yaml_sets(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        yaml.safe_dump({**NEEDED[TrainConfig], "gradient_checkpointing": True, "warmup_steps": 5}), "utf-8"
    )
    config: Any = parse(
        TrainConfig, ["--config", str(file), "--no-gradient-checkpointing", "--warmup-steps", "0"]
    )
    assert (config.gradient_checkpointing, config.warmup_steps) == (False, 0)


@pytest.mark.parametrize("kind", list(NEEDED))
def test_unknown_keys_are_refused(kind: type[BaseModel]) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'modle'; did you mean 'model'"):
        load_config(kind, {**NEEDED[kind], "modle": "x"})


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TrainConfig, {"steps": 0, "lr": "fast", "colour": 1})
    lines = raised.value.message.splitlines()
    assert len(lines) == 5
    for word in ("--shards is needed", "--steps 0", "--lr 'fast'", "'colour'"):
        assert any(word in line for line in lines)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="--lr"):
        load_config(TrainConfig, {"shards": "x", "lr": value})


def test_infer_needs_something_to_run() -> None:
    with pytest.raises(ConfigError, match="give --lora or --transformer, or --model"):
        load_config(InferConfig, {"prompt": ["x"]})
    with pytest.raises(ConfigError, match="give --prompt or --prompts-file"):
        load_config(InferConfig, {"lora": "x"})


def test_settings_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        save_config(TrainConfig(shards=Path("x")), tmp_path / "no" / "folder.yaml")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_lists_every_setting(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogcache.cli import run

    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    assert run([name, "--help"]) == 0
    shown = " ".join(Text.from_ansi(capsys.readouterr().out).plain.split())
    for field_name, field in COMMANDS[name].model_fields.items():
        assert f"--{field_name.replace('_', '-')} " in shown
        assert field.description
        assert field.description in shown, field_name
        if field.is_required():
            assert f"{field.description} [required]" in shown
        elif isinstance(field.default, bool):
            assert f"{field.description} [default: {'on' if field.default else 'off'}]" in shown
        elif isinstance(field.default, (int, float)):
            assert f"{field.description} [default: {field.default}]" in shown
    assert "--config " in shown


def test_shipped_examples_load() -> None:
    """Every YAML file of settings in the repository is valid; its command is the beginning of its name."""
    names = typing.cast("dict[str, type[BaseModel]]", COMMANDS)
    for file in sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")]):
        kind = next(kind for name, kind in names.items() if file.name.startswith(name))
        load_config(kind, {}, file)
