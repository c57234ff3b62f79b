"""Image-to-video from real clips to a LoRA, without a VAE in training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.lora import read_lora_header
from cogcache.precompute import encode_all
from cogcache.tiny import Family

BUNNY = Path(__file__).parents[2] / "cogcache" / "demo" / "bunny"
TRAIN = """
import sys
from pathlib import Path
from cogcache.config import TrainConfig
from cogcache.train import train
train(TrainConfig(shards=Path(sys.argv[1]), output=Path(sys.argv[2]), steps=5, rank=4, alpha=2, lr=1e-2,
                  batch_size=2, image_dropout=0.3, caption_dropout=0.1, device="cpu"))
unwanted = ("diffusers.models.autoencoders", "diffusers.pipelines.cogvideo", "transformers.models.t5", "decord", "av",
            "cogcache.precompute", "cogcache.video", "cogcache.infer", "cogcache.pictures")
print("FOUND", [m for m in sys.modules for u in unwanted if m == u or m.startswith(u + ".")])
"""


def test_bunny_trains_from_its_bank_alone(tiny_models: Callable[[Family], Path], tmp_path: Path) -> None:
    config = EncodeConfig(
        data_root=BUNNY, model=str(tiny_models("1.5-5b-i2v")), shards=tmp_path / "shards", frames=9, size="64x96",
        image_draws=2, device="cpu",
    )  # fmt: skip
    result = encode_all(config)
    assert (result.clips, result.images, result.failures) == (8, 16, [])
    assert all(len(row.images) == 2 for row in CacheReader(config.shards or Path()).samples)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(config.shards), str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "FOUND []", done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 6))
    assert all(0 < line["loss"] < 100 for line in lines)
    lora = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    assert read_lora_header(lora).alpha == 2
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(lora).items() if "lora_B" in name)
