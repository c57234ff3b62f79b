"""Where the libraries of gs:// and hf:// look for their servers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants


def google(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let gs:// lead to ``address``, without credentials of this machine, nor a search for them in the network."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def hugging_face(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As ``HF_ENDPOINT`` and ``HF_HUB_DISABLE_XET`` do, which the library reads when it is imported."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    pauses = SimpleNamespace(
        sleep=lambda seconds: time.sleep(seconds / 50)
    )  # it repeats some requests by itself
    monkeypatch.setattr("huggingface_hub.utils._http.time", pauses)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    for name, value in {**values, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
