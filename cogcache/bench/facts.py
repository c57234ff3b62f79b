"""What a figure was measured on and with: without it, it means nothing."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cogcache.cores import usable_cores

__all__ = ["machine_facts"]

_PACKAGES = (
    *("cogcache", "torch", "diffusers", "transformers", "accelerate", "peft", "av", "decord"),
    *("numpy", "safetensors", "zarr", "fsspec", "s3fs"),
)


def machine_facts() -> dict[str, object]:
    """Date, commit, processor, cores this process may use, GPU, versions. Unknown ones are None.

    Versions are those of what is installed and, with a GPU, of CUDA, cuDNN and the driver; others are left out.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in {**packages, **_gpu_versions()}.items() if version},
    }


def _commit() -> str | None:
    """The commit of the checkout that runs, with ``+`` if files in it have changed."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "--short", "HEAD")
        return name + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _gpu_versions() -> dict[str, str | None]:
    """Of CUDA and cuDNN as torch has them, and of the driver; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    cudnn: Any = torch.backends.cudnn
    found = cudnn.version()  # 91900 is 9.19.0
    return {"CUDA": torch.version.cuda, "cuDNN": str(found) if found else None, "driver": _driver()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()  # a line for each GPU


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
