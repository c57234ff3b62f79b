"""The recipe of the small model runs from clips to three model folders that the stock pipelines load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_makes_models_that_load(tmp_path: Path) -> None:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    script = ROOT / "scripts" / "small_model" / "make.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, tmp_path / "work", "--quick"], check=True, env=environment)
    models = tmp_path / "work" / "models"
    size = sum(file.stat().st_size for file in (models / "t2v").rglob("*.safetensors"))
    size += sum(
        file.stat().st_size
        for kind in ("i2v", "t2v-1.5")
        for file in (models / kind / "transformer").iterdir()
    )
    assert size < 25e6
    for kind, pipeline in (
        ("t2v", CogVideoXPipeline),
        ("t2v-1.5", CogVideoXPipeline),
        ("i2v", CogVideoXImageToVideoPipeline),
    ):
        loaded = pipeline.from_pretrained(models / kind, torch_dtype=torch.float32)
        assert loaded.transformer.config.num_layers == 8
    assert loaded.transformer.config.in_channels == 32
