"""Making embeddings: batches, weights that are streamed, and captions whose embeddings are of no use."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.errors import ModelError
from cogcache.precompute import encode_all, text
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.lane import Running
from cogcache.precompute.text import FrozenText, choose_batch_size, choose_offload
from cogcache.precompute.text_blocks import stream_blocks
from cogcache.tiny import Family
from cogcache.tiny.weights import randomise

Settings = Callable[..., EncodeConfig]


def poisoned(model: Path, token: int) -> None:
    """Make one token's embedding not a number."""
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["shared.weight"][token] = torch.nan
    save_file(tensors, weights, {"format": "pt"})


@pytest.fixture
def model(tiny_models: Callable[[Family], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models("5b"), tmp_path / "model")


def test_an_embedding_that_is_not_finite_fails_its_clips_alone(settings: Settings, model: Path) -> None:
    config = settings(model=str(model))
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    clips = find_clips(config.data_root, "auto", False)
    tokens = {clip.source: set(tokenizer(clip.caption).input_ids) for clip in clips}
    uses = Counter(token for found in tokens.values() for token in found)
    source, token = next((s, t) for s, found in tokens.items() for t in sorted(found) if uses[t] == 1)
    poisoned(model, token)

    result = encode_all(config)
    assert [(failure.source, "not finite" in failure.reason) for failure in result.failures] == [
        (source, True)
    ]
    reader = CacheReader(result.shards)
    assert {sample.source for sample in reader.samples} == tokens.keys() - {source}
    assert result.encoded == 8  # the latent of the clip is good and stays


def test_an_encoder_that_fails_on_the_empty_caption_stops_the_run(settings: Settings, model: Path) -> None:
    poisoned(model, 0)  # padding
    with pytest.raises(ModelError, match="not finite"):
        encode_all(settings(model=str(model)))


@pytest.fixture
def deep(tiny_models: Callable[[Family], Path], tmp_path: Path) -> Path:
    """A checkpoint whose text encoder has five blocks, more than are on the device at a time."""
    model = shutil.copytree(tiny_models("5b"), tmp_path / "deep")
    config = T5Config.from_pretrained(model / "text_encoder", num_layers=5)
    with torch.random.fork_rng():
        encoder = T5EncoderModel(config)
    randomise(encoder, "deep")
    encoder.save_pretrained(model / "text_encoder")
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_streamed_weights_give_the_same_embeddings(deep: Path, dtype: str) -> None:
    """Batch after batch, with two blocks' weights on the device at a time. In float16, T5 keeps some in float32."""
    device = torch.device("cpu")
    plain = FrozenText(deep, dtype, 12, device)
    streamed = FrozenText(deep, dtype, 12, device, offloaded=True)
    blocks = list(streamed._model.encoder.block)
    used: list[tuple[int, ...]] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: used.append(addresses(block)))
    homes = [addresses(block) for block in blocks]
    for batch in (["A bird"], ["A meadow", "", "Two squirrels run along a branch"], ["A bird"]):
        used.clear()
        assert torch.equal(streamed.encode(batch), plain.encode(batch))
        assert len(used) == 5
        assert len(set(used)) == 2
        assert not set(used) & set(homes)
    assert [addresses(block) for block in blocks] == homes


def addresses(block: torch.nn.Module) -> tuple[int, ...]:
    """Where the weights that all blocks have lie now."""
    return tuple(p.data_ptr() for name, p in block.named_parameters() if "relative" not in name)


def test_offloading_changes_no_byte_of_a_cache(
    settings: Settings, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, streamed = [], list[str]()

    def noted(model: T5EncoderModel, device: torch.device) -> None:
        streamed.append(choice)
        stream_blocks(model, device)

    monkeypatch.setattr(text, "stream_blocks", noted)
    for choice in ("on", "off", "auto"):
        encode_all(settings(model=str(deep), shards=tmp_path / choice, text_offload=choice))
        made.append({path.name: path.read_bytes() for path in (tmp_path / choice / "text").iterdir()})
    assert streamed == ["on"]
    assert made[0] == made[1] == made[2]
    assert made[0]


def test_weights_are_streamed_only_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, tokens = torch.device("cuda:0"), 32 * 226
    for free_gib, answer in ((24, False), (11, False), (10, True), (8, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free_gib: (free * 2**30, 0))
        assert choose_offload("auto", int(9.5 * 1e9), tokens, cuda) == answer, free_gib
        assert choose_offload("on", 1, tokens, cuda)
        assert not choose_offload("off", 10**12, tokens, cuda)
    assert not choose_offload("auto", 10**12, tokens, torch.device("cpu"))
    assert [choose_batch_size(None, torch.device(name)) for name in ("cuda", "cpu")] == [32, 8]
    assert choose_batch_size(3, cuda) == 3


def test_too_little_memory_for_captions_is_said(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(T5EncoderModel, "forward", full)
    with pytest.raises(ModelError, match="too small for the text encoder") as told:
        encode_all(settings(model=str(model)))
    assert "--text-offload on" in told.value.hint


def test_no_text_encoder_is_loaded_for_captions_that_are_there(
    settings: Settings, clips_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new clip with a caption that is known; then one with a new caption."""
    root = shutil.copytree(clips_root, tmp_path / "clips")
    config = settings(data_root=root)
    encode_all(config)
    (root / "9.mp4").write_bytes((root / "0.mp4").read_bytes() + b"\0\0\0\x08free")
    (root / "9.txt").write_text("A meadow")
    with monkeypatch.context() as patched:
        patched.setattr(FrozenText, "__init__", lambda *_, **__: pytest.fail("loaded T5"))
        result = encode_all(config)
    assert (result.encoded, result.captions, len(result.failures)) == (1, 0, 0)
    (root / "9.txt").write_text("A meadow at night")
    assert encode_all(config).captions == 1


def test_the_next_batch_is_begun_before_the_last_one_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four results waits for the start of the batch behind it."""
    change, start, result = threading.Condition(), FrozenText.start, Running.result
    batches: list[Running] = []

    def starting(self: FrozenText, captions: Sequence[str]) -> Running:
        with change:
            batches.append(start(self, captions))
            change.notify_all()
            return batches[-1]

    def late(self: Running) -> torch.Tensor:
        with change:
            if self in batches:
                needed = min(4, batches.index(self) + 2)
                assert change.wait_for(lambda: len(batches) >= needed, 20)
        return result(self)

    monkeypatch.setattr(FrozenText, "start", starting)
    monkeypatch.setattr(Running, "result", late)
    assert encode_all(settings(text_batch_size=2)).captions == 8
    assert len(batches) == 4
