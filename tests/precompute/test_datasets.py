"""Finding clips and captions: every layout, every mistake, all at once."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from cogcache.errors import DatasetError
from cogcache.precompute.datasets import ClipItem, find_clips

DEMO = Path(__file__).parents[2] / "cogcache" / "demo" / "bunny"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")


def lists(root: Path, videos: str, prompts: str, images: str | None = None) -> None:
    for name, text in (("videos", videos), ("prompts", prompts), ("images", images)):
        if text is not None:
            (root / f"{name}.txt").write_bytes(text.encode())


def jsonl(root: Path, *rows: Any) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def found(root: Path, dataset: Any = "auto", allow_outside: bool = False) -> list[tuple[str, str]]:
    return [(item.source, item.caption) for item in find_clips(root, dataset, allow_outside)]


def mistakes(root: Path, dataset: Any = "auto") -> list[str]:
    with pytest.raises(DatasetError) as caught:
        find_clips(root, dataset, False)
    assert all(mistake in str(caught.value) for mistake in caught.value.mistakes)
    return caught.value.mistakes


def test_the_demo_has_eight_clips() -> None:
    items = find_clips(DEMO, "auto", False)
    assert len(items) == 8
    assert items[2].source == "videos/03_bird.mp4"
    assert items[2].caption.startswith("A plump grey-purple cartoon bird")
    assert items[2].path == (DEMO / "videos/03_bird.mp4").resolve()


@pytest.mark.parametrize("encode", [str, lambda s: s.replace("\n", "\r\n"), lambda s: "\ufeff" + s])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lists_match_by_line(tmp_path: Path, encode: Any, end: str) -> None:
    touch(tmp_path, "v/b.mp4", "v/a.mp4")
    lists(tmp_path, encode("v/b.mp4\nv/a.mp4" + end), encode("Bee.\u2028Still bee.\n Ä \x0b a." + end))
    assert found(tmp_path) == [("v/b.mp4", "Bee.\u2028Still bee."), ("v/a.mp4", "Ä \x0b a.")]


def test_lists_with_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "i/a.png", "i/b.png")
    lists(tmp_path, "a.mp4\nb.mp4\n", "A\nB\n", "i/a.png\ni/b.png\n")
    assert [item.image for item in find_clips(tmp_path, "lists", False)] == ["i/a.png", "i/b.png"]
    lists(tmp_path, "a.mp4\nb.mp4\n", "A\nB\n", "i/a.png\n\n")
    assert mistakes(tmp_path) == ["images.txt line 2: blank line"]
    lists(tmp_path, "a.mp4\nb.mp4\n", "A\nB\n", "i/a.png\ni/c.png")
    assert mistakes(tmp_path) == ["images.txt line 2: i/c.png does not exist"]


def test_a_video_may_have_two_captions(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lists(tmp_path, "a.mp4\na.mp4\n", "One\nTwo\n")
    assert found(tmp_path) == [("a.mp4", "One"), ("a.mp4", "Two")]


def test_all_mistakes_of_lists_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "dir/x.mp4")
    lists(tmp_path, "a.mp4\n\nmissing.mp4\n../a.mp4\n/etc/passwd\ndir\na.mp4\n", "A\nB\n \nD\nE\nF\n")
    assert mistakes(tmp_path) == [
        "videos.txt line 2: blank line",
        "prompts.txt line 3: blank line",
        "the lists differ in their number of lines: videos.txt has 7, prompts.txt has 6",
        "videos.txt line 3: missing.mp4 does not exist",
        "videos.txt line 4: ../a.mp4 leaves the data root (--allow-outside accepts this)",
        "videos.txt line 5: /etc/passwd leaves the data root (--allow-outside accepts this)",
        "videos.txt line 6: dir is a folder, not a file",
    ]


def test_two_newlines_at_the_end_are_a_blank_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lists(tmp_path, "a.mp4\n", "A\n\n")
    assert "prompts.txt line 2: blank line" in mistakes(tmp_path)


def test_half_a_pair_of_lists(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    assert mistakes(tmp_path) == ["prompts.txt is missing"]
    (tmp_path / "prompts.txt").write_text("\n")
    assert mistakes(tmp_path) == ["prompts.txt is empty"]
    (tmp_path / "prompts.txt").write_bytes(b"fine\n\xff\xfe")
    assert mistakes(tmp_path) == ["prompts.txt line 2: not UTF-8 text"]


def test_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    touch(outside, "x.mp4")
    touch(root, "a.mp4")
    (root / "in.mp4").symlink_to(root / "a.mp4")
    (root / "out.mp4").symlink_to(outside / "x.mp4")
    (root / "folder").symlink_to(outside)
    lists(root, "in.mp4\nout.mp4\nfolder/x.mp4\n", "A\nB\nC\n")
    assert mistakes(root) == [
        "videos.txt line 2: out.mp4 links out of the data root (--allow-outside accepts this)",
        "videos.txt line 3: folder/x.mp4 links out of the data root (--allow-outside accepts this)",
    ]
    assert [source for source, _ in found(root, allow_outside=True)] == ["in.mp4", "out.mp4", "folder/x.mp4"]
    lists(root, f"../outside/x.mp4\n{outside / 'x.mp4'}", "A\nB")
    items = find_clips(root, "auto", True)
    assert {item.path for item in items} == {(outside / "x.mp4").resolve()}


def test_a_linked_data_root_is_no_way_out(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a.mp4", "b.mp4")
    lists(tmp_path / "real", "a.mp4\nb.mp4", "A\nB")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(found(tmp_path / "link")) == 2


@pytest.mark.parametrize(("disk", "listed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_either_normal_form(tmp_path: Path, disk: Any, listed: Any) -> None:
    name = "Häschen 大雄兔 №1.mp4"
    touch(tmp_path, unicodedata.normalize(disk, name))
    jsonl(tmp_path, {"file_name": unicodedata.normalize(listed, name), "text": "A"})
    (item,) = find_clips(tmp_path, "auto", False)
    assert item.path.is_file()
    assert item.source == unicodedata.normalize(listed, name)


def test_metadata_jsonl(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b/c.mp4", "i.png")
    jsonl(
        tmp_path,
        {"file_name": "b/c.mp4", "text": " Sea. ", "extra": [1]},
        {"text": "A", "file_name": "./a.mp4", "image": "i.png"},
    )
    items = find_clips(tmp_path, "auto", False)
    assert items[0] == ClipItem((tmp_path / "b/c.mp4").resolve(), "b/c.mp4", "Sea.")
    assert (items[1].source, items[1].image) == ("a.mp4", "i.png")


def test_all_mistakes_of_jsonl_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = ["{broken", "", "[1]", {"file_name": "a.mp4"}, {"file_name": 3, "text": ""}]
    rows += [{"file_name": "no.mp4", "text": "x"}, {"file_name": "a.mp4", "text": "x", "image": 1}]
    rows += ["[" * 5000, {"file_name": "a\0.mp4", "text": "x"}, {"file_name": "x" * 300, "text": "x"}]
    jsonl(tmp_path, *rows)
    got = mistakes(tmp_path)
    starts = [line.partition(":")[0].removeprefix("metadata.jsonl line ") for line in got]
    assert starts == ["1", "2", "3", "4", "5", "5", "7", "8", "6", "9", "10"]
    assert got[3] == "metadata.jsonl line 4: text is missing"
    assert "metadata.jsonl line 6: no.mp4 does not exist" in got


def test_metadata_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    text = '\ufefffile_name,text,score\r\na.mp4,"A, with\nbreak and ""quotes""",1\r\nb.mp4,B,2\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert found(tmp_path) == [("a.mp4", 'A, with\nbreak and "quotes"'), ("b.mp4", "B")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file_name,caption\na.mp4,A\n", "metadata.csv line 1: needs one column text"),
        (
            "file_name,text\na.mp4,A\na.mp4,un,quoted\n",
            "metadata.csv line 3: 3 fields where the header has 2",
        ),
        ("file_name,text\n\na.mp4,A\n", "metadata.csv line 2: blank line"),
        ('file_name,text\na.mp4,"A"x\n', "metadata.csv line 2: ',' expected after '\"'"),
        ("file_name,text\n", "metadata.csv lists no clips"),
        ('file_name,text\na.mp4,"two\nlines"\na.mp4,\n', "metadata.csv line 4: text is not a non-empty text"),
    ],
)
def test_mistakes_of_csv(tmp_path: Path, text: str, expected: str) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text(text)
    assert mistakes(tmp_path) == [expected]


def test_sidecars(tmp_path: Path) -> None:
    touch(tmp_path, "b.MP4", "a/z.webm", "a/._z.webm", ".hidden/x.mp4", unicodedata.normalize("NFD", "ä.mkv"))
    for name, text in {"b": "\ufeffBee\r\nsecond line\n", "a/z": "Z", "ä": "Umlaut", "a/README": "x"}.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8", newline="")
    names = [unicodedata.normalize("NFC", source) for source, _ in found(tmp_path)]
    assert names == ["a/z.webm", "ä.mkv", "b.MP4"] or names == ["a/z.webm", "b.MP4", "ä.mkv"]
    assert dict(found(tmp_path))["b.MP4"] == "Bee second line"


def test_all_mistakes_of_sidecars_at_once(tmp_path: Path) -> None:
    touch(
        tmp_path, "ok.mp4", "ok.txt", "lone.mp4", "twin.mp4", "twin.mov", "twin.txt", "typo.txt", "empty.mp4"
    )
    (tmp_path / "empty.txt").write_text(" \n")
    touch(tmp_path / "sub", "also.mp4")
    touch(tmp_path.parent / f"{tmp_path.name}-outside", "x.mp4", "x.txt")
    (tmp_path / "link").symlink_to(tmp_path.parent / f"{tmp_path.name}-outside")
    assert sorted(mistakes(tmp_path, "sidecar")) == [
        "empty.txt is empty",
        "link links out of the data root (--allow-outside accepts this)",
        "lone.mp4: no caption beside it (lone.txt)",
        "sub/also.mp4: no caption beside it (also.txt)",
        "twin.txt is beside twin.mov and twin.mp4: rename all but one",
        "typo.txt: no video of that name beside it",
    ]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4", "a/x.txt")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert found(tmp_path) == [("a/x.mp4", "video")]


def test_several_layouts_need_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lists(tmp_path, "a.mp4\n", "List\n")
    jsonl(tmp_path, {"file_name": "a.mp4", "text": "Json"})
    (tmp_path / "a.txt").write_text("Sidecar")
    with pytest.raises(DatasetError, match="--dataset lists or metadata or sidecar"):
        find_clips(tmp_path, "auto", False)
    assert [found(tmp_path, kind)[0][1] for kind in ("lists", "metadata", "sidecar")] == [
        "List",
        "Json",
        "Sidecar",
    ]
    touch(tmp_path, "metadata.csv")
    assert "keep one" in mistakes(tmp_path, "metadata")[0]


def test_roots_that_hold_nothing(tmp_path: Path) -> None:
    for root, reason in {tmp_path / "no": "does not exist", tmp_path: "is empty"}.items():
        with pytest.raises(DatasetError, match=reason):
            find_clips(root, "auto", False)
    touch(tmp_path, "a.mp4")
    with pytest.raises(DatasetError, match="holds 1 videos but no captions"):
        find_clips(tmp_path, "auto", False)
    with pytest.raises(DatasetError, match="is not a folder"):
        find_clips(tmp_path / "a.mp4", "auto", False)
    with pytest.raises(DatasetError, match="neither"):
        find_clips(tmp_path, "metadata", False)
    (tmp_path / "a.mp4").unlink()
    touch(tmp_path, "README.txt")
    with pytest.raises(DatasetError, match="lists no clips"):
        find_clips(tmp_path, "sidecar", False)
