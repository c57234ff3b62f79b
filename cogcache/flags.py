"""Command-line flags made from the pydantic configs, so that nothing is declared twice.

A field ``grad_accum: int`` becomes ``--grad-accum INTEGER`` with the field's description as help, under the
panel the field names. Flags not given stay out of the way of the YAML file and of the defaults.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape

from cogcache.config_io import load_config
from cogcache.location import Location

__all__ = ["config_command"]

Config = TypeVar("Config", bound=BaseModel)


def config_command(kind: type[Config], run: Callable[[Config], None], doc: str) -> Callable[..., None]:
    """A function for ``typer`` whose parameters are the fields of ``kind`` plus ``--config``.

    Called, it validates YAML and flags into a ``kind`` and hands that to ``run``.
    """

    def command(config: Path | None, **flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value is not None and value != []}
        run(load_config(kind, given, config))

    parameters = [_parameter(name, field) for name, field in kind.model_fields.items()]
    parameters.append(_config_parameter())
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = _unwrapped(doc)
    return command


def _unwrapped(doc: str) -> str:
    """Paragraphs as single lines, so that the terminal's width breaks them, not the source's."""
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help="YAML file with any of these settings (names with _). Flags win.")
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
    )


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _flag_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    declarations = [f"{flag}/--no{flag[1:]}"] if kind is bool else [flag]
    option = typer.Option(
        *declarations,
        help=_help_text(field),
        show_default=False,  # typer would put it in brackets of its own
        rich_help_panel=_extra(field).get("panel") or "Options",
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _flag_type(annotation: Any) -> Any:
    """The type typer should parse: optional and constrained wrappers are taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _flag_type(get_args(annotation)[0])
    if annotation == Location or annotation == Location | None:
        return str  # pydantic tells folder and URL apart
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return _flag_type(inner)
    if origin is list:
        return list[str]  # typer takes no other list of choices; pydantic checks the items
    if origin is Literal or annotation in (bool, int, float, str, Path):
        return annotation
    raise TypeError(f"no flag type for {annotation}")


def _help_text(field: FieldInfo) -> str:
    """The description, with whether it is required or its default behind it; safe from rich's markup."""
    note = "required" if field.is_required() else _default_text(field)
    return escape((field.description or "") + (f"  [{note}]" if note else ""))


def _default_text(field: FieldInfo) -> str:
    """``default: 42``; empty where the description says what happens without a value."""
    if field.default is None or field.default in ([], ""):
        return ""
    if isinstance(field.default, bool):
        return "default: on" if field.default else "default: off"
    if isinstance(field.default, list):
        return "default: " + ", ".join(str(item) for item in field.default)
    return f"default: {field.default}"
