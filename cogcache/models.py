"""Finding a checkpoint: a local folder, or a hub id of which only the needed parts are downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogcache.errors import ConfigError, ModelError
from cogcache.variants import read_config

if TYPE_CHECKING:
    import torch

__all__ = ["Component", "check_model_index", "loading", "pick_device", "resolve_model", "torch_dtype"]

Component = Literal["vae", "text_encoder", "tokenizer", "transformer", "scheduler"]

# Always brought along: the facts of a checkpoint are read from all of its configs, which are tiny.
_CONFIGS = ("model_index.json", "*/*.json")
_LIBRARIES = (["diffusers"], ["transformers"], [None])  # None: a part that is left out
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "vae": ("vae/*.safetensors",),
    "text_encoder": ("text_encoder/*.safetensors",),
    "tokenizer": ("tokenizer/*.model", "tokenizer/*.txt"),  # no code
    "transformer": ("transformer/*.safetensors",),
    "scheduler": (),
}


def resolve_model(model: str, components: Sequence[Component]) -> Path:
    """The local folder of a checkpoint in diffusers layout.

    An existing folder is taken as it is. Anything else of the form ``name/name`` is a hub id: its configs and
    the weights of ``components`` alone are downloaded to the hub cache (once). No code in a checkpoint is ever run.

    Raises:
        ModelError: if there is no such folder, or the download fails.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path, components)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_local:
        raise ModelError(
            f"there is no model folder {model!r}.",
            "Give a folder in diffusers layout or a hub id such as THUDM/CogVideoX-5b.",
        )
    return _checked(_download(model, components), components)


def _checked(root: Path, components: Sequence[Component]) -> Path:
    missing = [name for name in components if not (root / name).is_dir()]
    if missing:
        raise ModelError(
            f"{root} has no folder {', '.join(missing)}.",
            "A CogVideoX checkpoint in diffusers layout is needed.",
        )
    return root


def _download(model: str, components: Sequence[Component]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_CONFIGS, *(pattern for name in components for pattern in _WEIGHTS[name])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model!r} is no local folder and could not be fetched from the hub: {reason}",
            "Check the spelling and the network, or give a local folder.",
        ) from None


def check_model_index(root: Path) -> None:
    """Refuse a checkpoint whose ``model_index.json`` names any class but those of the two model libraries.

    A pipeline or a part may be named as ``[module, class]`` of a Python file in the checkpoint. diffusers asks before
    it runs such a file, but not in all versions and not in all places.

    Raises:
        ModelError: naming the part.
    """
    index = read_config(root, "model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, (list, dict))}
    for name, value in parts.items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] not in _LIBRARIES:
            raise ModelError(
                f"model_index.json in {root} wants code of its own for {name}: {value!r:.80}.",
                "Code in a checkpoint is never run. Take a checkpoint in the layout of diffusers' CogVideoX.",
            )


@contextmanager
def loading(part: str, root: Path) -> Iterator[None]:
    """Within this, whatever the model libraries raise over damaged files becomes a :class:`ModelError`.

    Their progress bars stay off the screen.
    """
    from cogcache.quiet import quiet_libraries

    try:
        with quiet_libraries():
            yield
    except (
        Exception
    ) as error:  # OSError, ValueError, KeyError, SafetensorError...: all mean the same to the user
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:300]
        raise ModelError(
            f"the {part} in {root} cannot be loaded: {reason}", "Is the checkpoint whole? Fetch it again."
        ) from error


def torch_dtype(name: str) -> torch.dtype:
    """``torch.bfloat16`` for ``"bfloat16"`` and so on; only floating dtypes."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    try:
        return dtypes[name]
    except KeyError:
        raise ConfigError(
            f"{name!r} is not a usable precision.", f"Choose one of {', '.join(dtypes)}."
        ) from None


def pick_device(name: str) -> torch.device:
    """The torch device for a ``--device`` value; ``auto`` is this process's CUDA device, else the CPU.

    Launchers give each process its own device by setting ``LOCAL_RANK``.

    Raises:
        ConfigError: if it is not known or not there.
    """
    import torch

    if name == "auto":
        local_rank = os.environ.get("LOCAL_RANK", "0")
        return torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{name!r} is not a device.", "Give auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{name!r} is not a device that can be used.", "Give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name!r} here.", f"{torch.cuda.device_count()} CUDA devices are."
        )
    return device
