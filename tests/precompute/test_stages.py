"""How entries flow: read ahead of a device that is given work without waiting for it, written behind it.

The device is played by :class:`Device`: its work is done when a test says so, as a GPU's is when it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogcache.cache.format import LATENTS, Entry, Identity, ModelRecord, entry_key
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.errors import ModelError, VideoError
from cogcache.precompute import stages
from cogcache.precompute.stages import Piece, encode_pieces
from cogcache.precompute.vae import FrozenVae
from cogcache.tiny import Family
from cogcache.variants import read_variant

WORKERS = 2
SOON_S = 20.0  # far more than anything here takes; only a test that fails waits for so long
Make = Callable[..., CacheWriter]


class Device:
    """Work on it is done once :attr:`done` reaches its number."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.started: list[int] = []
        self.finished: list[int] = []
        self.done = -1

    def piece(
        self, number: int, trouble: dict[int, BaseException], group: str = "9x32x48"
    ) -> Piece[Any, int]:
        def start(_: Any, __: Any) -> Callable[[], Entry]:
            with self.change:
                self.started.append(number)
                self.change.notify_all()
            return lambda: self._finish(number, trouble)

        return Piece(key(number), f"{number}.mp4", group, str(number), lambda: number, start)

    def _finish(self, number: int, trouble: dict[int, BaseException]) -> Entry:
        with self.change:
            assert self.change.wait_for(lambda: self.done >= number, SOON_S)
            self.finished.append(number)
        if number in trouble:
            raise trouble[number]
        return Entry(key(number), {"moments": torch.full((32, 3, 4, 6), float(number))}, {"number": number})

    def let(self, number: int) -> None:
        """Let work up to ``number`` be done."""
        with self.change:
            self.done = number
            self.change.notify_all()

    def wait_started(self, count: int) -> bool:
        with self.change:
            return self.change.wait_for(lambda: len(self.started) >= count, SOON_S)


def key(number: int) -> str:
    return entry_key({"made_by": "test"}, number=number)


@pytest.fixture
def writer(tiny_models: Callable[[Family], Path], tmp_path: Path) -> Make:
    """A writer with shards planned for so many entries; of ``name``."""

    def make(
        count: int, per_shard: int = 2, name: str = "cache", groups: tuple[str, ...] = ("9x32x48",)
    ) -> CacheWriter:
        variant = read_variant(tiny_models("5b"))
        identity = Identity(
            model=ModelRecord(id="x", variant=variant), series={LATENTS: {"made_by": "test"}}, buckets=groups
        )
        opened = CacheWriter.open(tmp_path / name, identity)
        share = -(-count // len(groups))
        for place, group in enumerate(groups):
            numbers = range(place * share, min(count, (place + 1) * share))
            opened.plan(LATENTS, [key(number) for number in numbers], per_shard, group)
        return opened

    return make


def in_a_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def content(root: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix in (".tar", ".jsonl")
    }


def test_work_is_begun_before_the_last_result_is_there_and_only_so_much(writer: Make) -> None:
    device, cache = Device(), writer(12)
    pieces = [device.piece(number, {}) for number in range(12)]
    thread, outcome = in_a_thread(
        lambda: encode_pieces(cache, LATENTS, pieces, object, unit="clips", workers=WORKERS)
    )
    for number in range(12):
        assert device.wait_started(min(12, number + 2))  # the next one waits for the one that is worked on
        time.sleep(0.01)
        assert len(device.started) <= number + 4
        device.let(number)
    thread.join(SOON_S)
    (tally,) = outcome
    assert (tally.encoded, tally.failed) == (12, 0)
    assert device.started == device.finished == list(range(12))
    assert cache.usable(LATENTS) == {piece.key for piece in pieces}


def test_a_result_of_no_use_fails_its_clip_alone(writer: Make) -> None:
    """Recorded with its reason and in its place; shards are those of a run that knew it from the start."""
    late, early = Device(), Device()
    late.let(99)
    early.let(99)
    trouble = VideoError("not finite")
    cache = writer(7)
    troubles: dict[int, BaseException] = {3: trouble, 6: MemoryError()}
    pieces = [late.piece(n, troubles) for n in range(7)]
    tally = encode_pieces(cache, LATENTS, pieces, object, unit="clips", workers=WORKERS)
    assert (tally.encoded, tally.failed) == (5, 2)
    assert cache.failures() == {key(3): "not finite", key(6): "not enough memory to read it"}

    def unread() -> int:
        raise trouble

    other = writer(7, name="other")
    pieces = [early.piece(n, {}) for n in range(7)]
    for n in (3, 6):
        pieces[n] = Piece(key(n), f"{n}.mp4", "9x32x48", str(n), unread, pieces[n].start)
    assert encode_pieces(other, LATENTS, pieces, object, unit="clips", workers=WORKERS).failed == 2
    shards = {name: data for name, data in content(cache.root).items() if name.endswith(".tar")}
    assert shards == {name: data for name, data in content(other.root).items() if name.endswith(".tar")}
    assert len(shards) == 4 - 1  # the seventh entry was alone in its shard


@pytest.mark.parametrize("where", ["result", "write"])
def test_an_error_behind_stops_the_run_and_the_next_goes_on(
    writer: Make, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache = writer(9, name="whole"), writer(9)
    device = Device()
    device.let(99)
    pieces = [device.piece(n, {}) for n in range(9)]
    encode_pieces(whole, LATENTS, pieces, object, unit="clips", workers=WORKERS)
    broken = Device()
    broken.let(99)
    append = ShardJob.append

    def full(job: ShardJob, entry: Entry) -> None:
        if entry.facts["number"] == 5:
            raise OSError("no space left")
        append(job, entry)

    if where == "write":
        monkeypatch.setattr(ShardJob, "append", full)
    trouble: dict[int, BaseException] = {5: RuntimeError("the GPU fell off")} if where == "result" else {}
    with pytest.raises((RuntimeError, OSError), match=r"fell off|no space"):
        encode_pieces(
            cache,
            LATENTS,
            [broken.piece(n, trouble) for n in range(9)],
            object,
            unit="clips",
            workers=WORKERS,
        )
    monkeypatch.undo()
    there = cache.committed(LATENTS)
    assert there in [{key(n) for n in range(count)} for count in range(6)]
    tally = encode_pieces(cache, LATENTS, pieces, object, unit="clips", workers=WORKERS)
    assert tally.encoded == 9 - len(there)
    assert {k: v for k, v in content(cache.root).items() if k.endswith(".tar")} == {
        k: v for k, v in content(whole.root).items() if k.endswith(".tar")
    }


def test_too_little_memory_of_the_gpu_is_said_once_and_what_is_done_stays(
    writer: Make, tiny_models: Callable[[Family], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FrozenVae(tiny_models("5b"), "float32", tiled=False, device=torch.device("cpu"))
    frames = torch.zeros(1, 9, 32, 48, 3, dtype=torch.uint8)
    whole, calls = frozen._vae.encode, []

    def little(pixels: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return whole(pixels)

    monkeypatch.setattr(frozen._vae, "encode", little)

    def start(number: int) -> Callable[[Any, Any], Callable[[], Entry]]:
        def begin(model: FrozenVae, _: Any) -> Callable[[], Entry]:
            running = model.start(frames)
            return lambda: Entry(key(number), {"moments": running.result()[0]}, {})

        return begin

    cache = writer(6)
    pieces = [Piece(key(n), f"{n}.mp4", "9x32x48", str(n), lambda: 0, start(n)) for n in range(6)]
    with pytest.raises(ModelError, match="too small for the VAE") as told:
        encode_pieces(cache, LATENTS, pieces, lambda: frozen, unit="clips", workers=WORKERS)
    assert told.value.hint == "Use --tiling on."
    assert cache.committed(LATENTS) <= {key(0), key(1)}
    assert cache.failures() == {}


def test_files_are_read_ahead_across_shards_and_groups_within_bounds(writer: Make) -> None:
    """One entry a shard and three groups: while the first is not yet taken, as many are read as the bound says."""
    device = Device()
    cache = writer(30, per_shard=1, groups=("9x32x48", "9x48x32", "17x32x32"))
    read, gate, change = list[int](), threading.Event(), threading.Condition()

    def reading(number: int) -> Callable[[], int]:
        def read_one() -> int:
            with change:
                read.append(number)
                change.notify_all()
            return number

        return read_one

    pieces = [Piece(key(n), f"{n}.mp4", "", str(n), reading(n), device.piece(n, {}).start) for n in range(30)]

    def load() -> object:
        assert gate.wait(SOON_S)
        return object()

    thread, outcome = in_a_thread(
        lambda: encode_pieces(cache, LATENTS, pieces, load, unit="clips", workers=WORKERS)
    )
    with change:
        assert change.wait_for(lambda: len(read) == WORKERS + 4, SOON_S)
    time.sleep(0.05)
    assert sorted(read) == list(range(WORKERS + 4))
    gate.set()
    device.let(99)
    thread.join(SOON_S)
    assert outcome[0].encoded == 30


def test_draws_of_one_picture_share_a_read_and_count_once(writer: Make) -> None:
    device, reads = Device(), list[int]()
    device.let(99)
    cache = writer(24, per_shard=100)

    def read(picture: int) -> int:
        reads.append(picture)
        return picture

    pieces = [
        Piece(key(n), "x", "", str(n // 8), partial(read, n // 8), device.piece(n, {}).start)
        for n in range(24)
    ]
    assert encode_pieces(cache, LATENTS, pieces, object, unit="images", workers=WORKERS).encoded == 24
    assert sorted(reads) == [0, 1, 2]


def test_waiting_counts_only_while_the_device_has_nothing_to_do(
    writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file takes an hour; the device works on the first all the while, so nothing was lost."""
    device, clock = Device(), [0.0]
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cache = writer(2)

    def slow() -> int:
        assert device.wait_started(1)
        time.sleep(0.2)  # until it is asked for
        clock[0] += 3600.0
        return 1

    first, second = device.piece(0, {}), device.piece(1, {})
    pieces = [first, Piece(key(1), "1.mp4", "", "1", slow, second.start)]
    thread, outcome = in_a_thread(
        lambda: encode_pieces(cache, LATENTS, pieces, object, unit="clips", workers=WORKERS)
    )
    assert device.wait_started(2)
    device.let(1)
    thread.join(SOON_S)
    assert (outcome[0].waited_s, outcome[0].seconds) == (0.0, 3600.0)
