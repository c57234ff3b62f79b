"""Work that is begun on a GPU and read later gives what work done at once gives."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcache.config import EncodeConfig
from cogcache.precompute import encode_all
from cogcache.precompute.lane import Lane
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.tiny import Family


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("needs a GPU")
    return torch.device("cuda:0")


def test_on_a_cpu_everything_is_done_at_once() -> None:
    way, values = Lane(torch.device("cpu")), torch.arange(6.0)
    assert way.upload(values) is values
    assert way.download(values, way.mark()).result() is values
    assert way.busy_s == 0


@pytest.mark.gpu
def test_tensors_go_to_a_gpu_and_back_while_it_works(cuda: torch.device) -> None:
    """Many at once, through memory that is reused; the caller's tensors are gone before the GPU has come to them."""
    way, weight = Lane(cuda), torch.randn(2048, 2048, device=cuda)
    running = []
    for number in range(40):
        begun = way.mark()
        there = way.upload(torch.full((1024, 2048), float(number)))
        for _ in range(20):
            there = there + 0 * (there @ weight).mean().nan_to_num()
        running.append(way.download(there, begun))
        del there
    gc.collect()
    for number, one in enumerate(running):
        result = one.result()
        assert result.device.type == "cpu"
        assert (result == number).all()
    assert way.busy_s > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clips_begun_together_are_those_encoded_one_by_one(
    cuda: torch.device, tiny_models: Callable[[Family], Path], dtype: str
) -> None:
    vae = FrozenVae(tiny_models("5b"), dtype, tiled=False, device=cuda)
    source = torch.Generator().manual_seed(0)
    clips = [
        torch.randint(0, 256, (1, 17, 64, 96, 3), dtype=torch.uint8, generator=source) for _ in range(12)
    ]
    alone = [vae.encode(clip).clone() for clip in clips]
    together = [vae.start(clip.clone()) for clip in clips]
    assert all(torch.equal(one.result(), other) for one, other in zip(together, alone, strict=True))
    assert vae.busy_s > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_text_encoder_streamed_through_a_gpu_gives_the_same(
    cuda: torch.device, tiny_models: Callable[[Family], Path], dtype: str
) -> None:
    root = tiny_models("5b")
    plain = FrozenText(root, dtype, 226, cuda)
    streamed = FrozenText(root, dtype, 226, cuda, offloaded=True)
    batches = [["A bird", f"picture {number}"] for number in range(8)]
    begun = [streamed.start(batch) for batch in batches]
    for batch, running in zip(batches, begun, strict=True):
        assert torch.equal(running.result(), plain.encode(batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_cache_made_on_a_gpu_depends_on_no_number_of_threads(
    settings: Callable[..., EncodeConfig], tmp_path: Path
) -> None:
    made = []
    for workers in (1, 8):
        shards = tmp_path / str(workers)
        result = encode_all(settings(shards=shards, device="cuda", workers=workers))
        assert (result.encoded, result.failures) == (8, [])
        made.append({path.name: path.read_bytes() for path in sorted(shards.rglob("*.tar"))})
    assert made[0] == made[1]
