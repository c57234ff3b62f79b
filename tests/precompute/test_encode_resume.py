"""Encoding may be killed at any moment: nothing committed is lost, and the end result is the same."""

from __future__ import annotations

import importlib
import multiprocessing
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from cogcache.cache.format import Entry
from cogcache.cache.reader import CacheReader
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.config import EncodeConfig
from cogcache.precompute import encode_all
from cogcache.precompute.lane import Running
from cogcache.precompute.stages import Tally
from cogcache.precompute.text import FrozenText
from cogcache.stopping import STOPPED

KILLS = 20


def content(root: Path) -> dict[str, bytes]:
    """Every file of a cache but the journal (it holds times), the locks and the saved settings."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", ".yaml")) and path.name != "journal.jsonl"
    }


def durable_keys(root: Path) -> set[bytes]:
    """Keys of all entries in committed and in unfinished shards; torn lines do not count."""
    keys: set[bytes] = set()
    for index in [*root.rglob("*.index.jsonl"), *root.rglob("*.index.part")]:
        lines = index.read_bytes().split(b"\n")[:-1]
        keys |= {found[1] for line in lines if (found := re.search(rb'"key":"([0-9a-f]{32})"', line))}
    return keys


@pytest.fixture(scope="module")
def damaged_root(clips_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight clips, the fourth of them unreadable."""
    root = tmp_path_factory.mktemp("damaged") / "clips"
    shutil.copytree(clips_root, root)
    (root / "3.mp4").write_bytes(b"not a video at all" * 100)
    return root


@pytest.fixture
def small_shards(settings: Callable[..., EncodeConfig], damaged_root: Path) -> Callable[..., EncodeConfig]:
    """A few latents and one embedding in a shard, so that there are several of each."""

    def make(shards: Path) -> EncodeConfig:
        return settings(
            data_root=damaged_root,
            shards=shards,
            size="16x32",
            shard_size=0.029,  # MB: an embedding
            text_batch_size=2,
        )

    return make


def test_kill_at_any_moment_changes_nothing(
    small_shards: Callable[..., EncodeConfig], encode_server: Any, tmp_path: Path
) -> None:
    (code,), said, seconds = encode_server.run(small_shards(tmp_path / "reference"))
    assert code == 3, said
    expected = content(tmp_path / "reference")
    assert sum(name.endswith(".tar") for name in expected) >= 5
    shards = tmp_path / "killed"
    dice = random.Random(20240601)
    kills, finished, progress = 0, 0, set[int]()
    kept: set[bytes] = set()
    while kills < KILLS or not finished:
        when: dict[str, Any] = {}  # every second kill comes while entries are written, the others at any time
        if kills < KILLS:
            when = {"after_s": dice.uniform(0, seconds)}
        if kills < KILLS and kills % 2:
            when = {"after_s": dice.uniform(0, 0.01), "after_lines": dice.randint(1, 8)}
        (code,), said, _ = encode_server.run(small_shards(shards), **when)
        if code == -signal.SIGKILL:
            kills += 1
            now = durable_keys(shards) if shards.exists() else set()
            assert kept <= now, "a durable entry is gone"
            kept = now
            progress.add(len(kept))
            committed = {name: data for name, data in content(shards).items() if _is_committed(shards, name)}
            assert committed.items() <= expected.items()
        else:
            assert code == 3, said
            assert content(shards) == expected
            shutil.rmtree(shards)
            kept = set()
            finished += 1
    assert len(progress) > 3, "kills came at too few different points"


def _is_committed(root: Path, name: str) -> bool:
    index = re.sub(r"\.tar$", ".index.jsonl", name)
    return name.endswith((".tar", ".index.jsonl")) and (root / index).exists()


def test_two_processes_share_the_work(
    small_shards: Callable[..., EncodeConfig], encode_server: Any, tmp_path: Path
) -> None:
    (code,), said, _ = encode_server.run(small_shards(tmp_path / "alone"))
    assert code == 3, said
    both = small_shards(tmp_path / "both")
    codes, said, _ = encode_server.run(both, both)
    assert set(codes) <= {0, 3}, said
    assert 3 in codes, said
    assert content(tmp_path / "both") == content(tmp_path / "alone")
    assert len(CacheReader(tmp_path / "both").samples) == 7


def _claim_and_wait(config: EncodeConfig, claimed: Connection) -> None:
    """Encode until the first shard is claimed and an entry for it is made, and no further."""

    def waiting(self: ShardJob, entry: Entry) -> None:
        claimed.send(f"{self.series} {entry.key}")
        signal.pause()

    ShardJob.append = waiting
    encode_all(config)


@pytest.mark.parametrize("moment", ["before captions", "after captions"])
def test_a_shard_is_taken_over_whose_process_is_killed_after_it_was_passed(
    moment: str, small_shards: Callable[..., EncodeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The survivor finds the shard claimed when it looks for work, and free when it is about to commit."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["cogcache.precompute.encode", __name__])
    receive, send = processes.Pipe(duplex=False)
    sibling = processes.Process(target=_claim_and_wait, args=(small_shards(tmp_path / "shards"), send))
    sibling.start()
    send.close()
    series, key = receive.recv().split()
    assert series == "latents"

    def captions(writer: CacheWriter, *args: Any) -> Tally:
        tally = Tally() if moment == "before captions" else encode_text(writer, *args)
        assert sibling.is_alive() == (not killed)
        if not killed:
            assert key not in writer.committed("latents")
            assert writer.busy()
            sibling.kill()
            sibling.join()
        killed.append(moment)
        return encode_text(writer, *args) if moment == "before captions" else tally

    module = importlib.import_module(encode_all.__module__)  # the package has a function of its name
    encode_text, killed = module.encode_text, list[str]()
    monkeypatch.setattr(module, "encode_text", captions)
    result = encode_all(small_shards(tmp_path / "shards"))
    assert killed == [moment]
    assert result.manifest is not None
    assert [failure.source for failure in result.failures] == ["3.mp4"]
    assert (result.encoded, result.captions) == (7, 8)
    monkeypatch.undo()
    encode_all(small_shards(tmp_path / "alone"))
    assert content(tmp_path / "shards") == content(tmp_path / "alone")


def test_full_disk_loses_nothing(
    small_shards: Callable[..., EncodeConfig], encode_server: Any, tmp_path: Path
) -> None:
    config = small_shards(tmp_path / "shards")
    (code,), said, _ = encode_server.run(config, file_limit=12_000)
    assert code == 2
    assert "Traceback" not in said
    assert re.search(r"Error: .*latents.* cannot be written: the file would become larger", said)
    kept = durable_keys(config.shards)
    assert kept
    (code,), said, _ = encode_server.run(config)
    assert code == 3, said
    assert kept <= durable_keys(config.shards)
    encode_server.run(small_shards(tmp_path / "reference"))
    assert content(config.shards) == content(tmp_path / "reference")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_says_how_to_go_on(
    number: int,
    expected: int,
    small_shards: Callable[..., EncodeConfig],
    encode_server: Any,
    tmp_path: Path,
) -> None:
    encode_server.run(small_shards(tmp_path / "reference"))
    config = small_shards(tmp_path / "shards")
    (code,), said, _ = encode_server.run(config, after_s=0, after_lines=2, signal_number=number)
    assert code == expected  # SIGTERM ends the process itself, which a shell reports as 143
    assert "Traceback" not in said
    assert said.count(STOPPED) == 1
    (code,), said, _ = encode_server.run(config)
    assert code == 3, said
    assert content(config.shards) == content(tmp_path / "reference")


def test_batches_of_captions_do_not_depend_on_interruptions(
    settings: Callable[..., EncodeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row's last bits may depend on the batch it is in, so a resumed run must form the same batches."""
    batches: list[tuple[str, ...]] = []
    stop_after = 10**9

    def recording(self: FrozenText, captions: Sequence[str]) -> Running:
        batches.append(tuple(captions))
        return start(self, captions)

    def stopping(self: ShardJob, entry: Entry) -> None:
        nonlocal stop_after
        if self.series == "text":
            stop_after -= 1
            if stop_after < 0:
                raise KeyboardInterrupt
        append(self, entry)

    start, append = FrozenText.start, ShardJob.append
    monkeypatch.setattr(FrozenText, "start", recording)
    monkeypatch.setattr(ShardJob, "append", stopping)
    encode_all(settings(shards=tmp_path / "reference", text_batch_size=3))
    undisturbed, batches = batches, []
    assert [len(batch) for batch in undisturbed] == [3, 3, 2]
    for already in (1, 3, 4, 7):
        shards = tmp_path / f"stopped-after-{already}"
        stop_after = already
        with pytest.raises(KeyboardInterrupt):
            encode_all(settings(shards=shards, text_batch_size=3))
        stop_after, batches = 10**9, []
        assert encode_all(settings(shards=shards, text_batch_size=3)).captions == 8 - already
        assert batches == undisturbed[already // 3 :]
        assert content(shards) == content(tmp_path / "reference")
