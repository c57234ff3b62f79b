"""Settings from YAML and flags, and back to YAML beside the output."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cogcache.errors import ConfigError, StorageError

__all__ = ["load_config", "read_yaml", "save_config"]

Config = TypeVar("Config", bound=BaseModel)

_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother, _shown.maxlong = 3, 200, 200, 40


def load_config(kind: type[Config], flags: Mapping[str, Any], file: Path | None = None) -> Config:
    """Validate settings: those of ``file`` first, ``flags`` win, the rest are defaults.

    Raises:
        ConfigError: naming every wrong or unknown setting, one line each.
    """
    settings = read_yaml(file) if file else {}
    settings.update(flags)
    try:
        return kind(**settings)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, file)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        ConfigError: if the file is missing or is not a mapping.
    """
    import yaml

    try:
        text = path.read_text("utf-8-sig")
        content, twice = yaml.safe_load(text), _twice(yaml.compose(text, yaml.SafeLoader))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except (
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
    ) as error:  # PyYAML's, over wrong tagged values
        raise ConfigError(f"{path} is not YAML: {type(error).__name__}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as 'name: value' lines.")
    if twice:
        raise ConfigError(f"{path} gives {twice!r} twice.", "Keep one of the lines.")
    return {_field_name(key): value for key, value in content.items()}


def _field_name(key: object) -> str:
    return str(key).replace("-", "_")


def _twice(node: Any) -> str:
    """The first key that a YAML mapping holds twice, spelt with _ or -; YAML itself lets the last one win."""
    pairs = node.value if getattr(node, "id", "") == "mapping" else []
    names = [_field_name(key.value) for key, _ in pairs]
    return next((name for place, name in enumerate(names) if name in names[:place]), "")


def save_config(config: BaseModel, path: Path) -> None:
    """Write the effective settings as YAML that ``--config`` takes back.

    Raises:
        StorageError: if the file cannot be written.
    """
    import yaml

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None


def _explain(kind: type[BaseModel], error: ValidationError, file: Path | None) -> str:
    lines = [_explain_one(kind, problem) for problem in error.errors()]
    where = f" (settings from {file} and the command line)" if file else ""
    return lines[0] + where if len(lines) == 1 else "\n  ".join([f"wrong settings{where}:", *lines])


def _explain_one(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{_nearest(kind, name)}"
    if problem["type"] == "missing":
        return f"--{name.replace('_', '-')} is needed: {kind.model_fields[name].description}"
    return f"--{name.replace('_', '-')} {_shown.repr(problem['input'])}: {message}"


def _nearest(kind: type[BaseModel], name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, kind.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
