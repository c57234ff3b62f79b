"""What all command configs share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

__all__ = ["CommandConfig", "DtypeChoice", "setting"]

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


def setting(default: Any, description: str, *, panel: str = "", **limits: Any) -> Any:
    """A pydantic field that also knows its ``--help`` panel."""
    extra: dict[str, Any] = {"panel": panel}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class CommandConfig(BaseModel):
    """Base of all command configs: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False
    )
