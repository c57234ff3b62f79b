"""The recipe of the small model runs from clips to three model folders that the stock pipelines load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_makes_models_that_load(tmp_path: Path) -> None:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    script = ROOT / "scripts" / "small_model" / "make.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, grey in enumerate((30, 200)):
        Image.new("RGB", (192, 128), (grey, 90, 60)).save(pictures / f"{number}.jpg")
    words = [tmp_path / "work", "--quick", "--pictures", pictures, "--set", "clips=12"]
    subprocess.run([sys.executable, script, *words], check=True, env=environment)
    assert len(list((tmp_path / "work" / "clips" / "train" / "videos").iterdir())) == 12
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
        loaded = pipeline.from_pretrained(models / kind, dtype=torch.float32)
        assert loaded.transformer.config.num_layers == 8
    assert loaded.transformer.config.in_channels == 32


def test_a_setting_that_is_none_is_told() -> None:
    script = ROOT / "scripts" / "small_model" / "make.py"
    for wrong in ("vea=3", "vae", "vae=x"):
        done = subprocess.run(
            [sys.executable, script, "work", "--set", wrong],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "is not one of clips, held_out" in done.stderr
