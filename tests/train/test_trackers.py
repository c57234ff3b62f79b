"""TensorBoard, as its own reader reads it, and Weights & Biases, as a stand-in for its package receives it.

W&B needs an account or a server of its own, so its package is replaced by one that notes what it is given.

Mutations tried, each caught: the id not kept; not passed on; passed on to a new run; ``resume`` left out; the error of
``init`` let through; steps left out; names without their prefix; videos or captions left out; a run left open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pytest

from cogcache.cli import run
from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.mp4 import write_mp4
from cogcache.train import train
from cogcache.train.metrics import SampledVideo, Tracker, ValidationResult, open_trackers

Settings = Callable[..., TrainConfig]
Points = dict[str, dict[int, float]]


class FakeVideo:
    """A video as W&B is given it."""

    def __init__(self, path: str, *, caption: str, format: str) -> None:
        self.path, self.caption, self.format = Path(path), caption, format


class FakeRun:
    """A W&B run; it drops steps that lie behind, as W&B does."""

    def __init__(self, run_id: str) -> None:
        self.id, self.history, self.finished = run_id, list[tuple[int, dict[str, Any]]](), 0

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.finished
        if not self.history or step >= self.history[-1][0]:
            self.history.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class FakeWandb(ModuleType):
    """The part of the package that is used."""

    Video = FakeVideo

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: dict[str, FakeRun] = {}
        self.inits: list[dict[str, Any]] = []

    def init(self, *, id: str | None = None, resume: str | None = None, **options: Any) -> FakeRun:
        self.inits.append({"id": id, "resume": resume, **options})
        if id is None or resume != "allow":
            id = f"run{len(self.inits)}"
        known = self.runs.setdefault(id, FakeRun(id))
        known.finished = 0
        return known


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


class Shown(Protocol):
    """What a tracker shows of an output folder."""

    def scalars(self, folder: Path) -> Points:
        """Name -> step -> value."""
        ...

    def videos(self, folder: Path) -> dict[str, list[int]]:
        """Name -> steps."""
        ...


class TensorBoardShown:
    """Read from the event files."""

    @staticmethod
    def _events(folder: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
        return events.Reload()

    def scalars(self, folder: Path) -> Points:
        events = self._events(folder)
        return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}

    def videos(self, folder: Path) -> dict[str, list[int]]:
        events = self._events(folder)
        return {name: [e.step for e in events.Images(name)] for name in events.Tags()["images"]}


class WandbShown:
    """Read from the one run there must be."""

    def __init__(self, package: FakeWandb) -> None:
        self.package = package

    def _logged(self) -> list[tuple[int, str, Any]]:
        (only,) = self.package.runs.values()
        assert only.finished == 1
        return [(step, name, value) for step, values in only.history for name, value in values.items()]

    def scalars(self, _folder: Path) -> Points:
        found: Points = {}
        for step, name, value in self._logged():
            if not isinstance(value, FakeVideo):
                found.setdefault(name, {})[step] = value
        return found

    def videos(self, _folder: Path) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for step, name, value in self._logged():
            if isinstance(value, FakeVideo):
                assert (value.path.is_file(), value.format) == (True, "mp4")
                found.setdefault(name, []).append(step)
        return found


@pytest.fixture(params=["tensorboard", "wandb"])
def tracker(request: pytest.FixtureRequest) -> tuple[str, Shown]:
    """The name of each tracker, and how to see what it shows."""
    if request.param == "wandb":
        return "wandb", WandbShown(request.getfixturevalue("wandb"))
    return "tensorboard", TensorBoardShown()


def opened(settings: Settings, folder: Path, name: str, done: int = 0) -> list[Tracker]:
    folder.mkdir(exist_ok=True)
    return open_trackers(settings(report_to=[name], resume="latest" if done else None), folder, done)


def result(folder: Path, step: int, loss: float) -> ValidationResult:
    path = folder / "samples" / f"step-{step:06d}" / "000.mp4"
    path.parent.mkdir(parents=True)
    write_mp4(path, np.full((3, 32, 48, 3), 90, np.uint8), 8.0)
    return ValidationResult({100: [loss], 900: [float("nan")]}, [SampledVideo(path, "a meadow")], 0, 1.0)


def test_numbers_reach_a_tracker_and_nothing_else(
    settings: Settings, tmp_path: Path, tracker: tuple[str, Shown]
) -> None:
    name, shown = tracker
    trackers = opened(settings, tmp_path / "out", name)
    for step in (1, 2):
        for each in trackers:
            each.log(step, {"loss": step / 2, "lr": 1, "grad_norm": None, "samples": [{"id": "x"}]})
    for each in trackers:
        each.close()
    assert shown.scalars(tmp_path / "out") == {"train/loss": {1: 0.5, 2: 1.0}, "train/lr": {1: 1, 2: 1}}
    assert shown.videos(tmp_path / "out") == {}


def test_validations_reach_a_tracker(settings: Settings, tmp_path: Path, tracker: tuple[str, Shown]) -> None:
    name, shown = tracker
    trackers = opened(settings, tmp_path / "out", name)
    for step, loss in ((0, 0.5), (3, 0.25)):
        found = result(tmp_path / "out", step, loss)
        for each in trackers:
            each.validation(step, found)
    for each in trackers:
        each.close()
    assert shown.scalars(tmp_path / "out") == {
        "validation/loss_t100": {0: 0.5, 3: 0.25}
    }  # not what is no number
    assert shown.videos(tmp_path / "out") == {"samples/000": [0, 3]}


def test_a_resumed_training_goes_on_in_the_same_curves(
    settings: Settings, tmp_path: Path, tracker: tuple[str, Shown]
) -> None:
    """Stopped after step 3, gone on from the checkpoint of step 2: no step is missing or there twice."""
    name, shown = tracker
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = opened(settings, tmp_path / "out", name, done)
        for step in steps:
            for each in trackers:
                each.log(step, {"loss": step})
        for each in trackers:
            each.close()
    assert shown.scalars(tmp_path / "out") == {"train/loss": {1: 1, 2: 2, 3: 3, 4: 4}}


def test_a_training_with_wandb(settings: Settings, wandb: FakeWandb, metrics: Any) -> None:
    """From ``train`` on: the losses of metrics.jsonl, the settings, one run over a resume, another elsewhere."""
    config = settings(steps=2, checkpoint_every=1, report_to=["wandb"])
    output = train(config).output
    train(config.model_copy(update={"steps": 3, "resume": "latest"}))
    assert (output / "wandb-run.txt").read_text() == "run1\n"
    assert [(init["id"], init["resume"]) for init in wandb.inits] == [(None, "allow"), ("run1", "allow")]
    assert wandb.inits[1]["config"]["steps"] == 3
    assert wandb.inits[1]["allow_val_change"] is True
    (first,) = wandb.runs.values()
    told = {step: values["train/loss"] for step, values in first.history}
    assert told == {line["step"]: line["loss"] for line in metrics(output)}
    assert sorted(told) == [1, 2, 3]
    assert first.finished == 1
    train(config.model_copy(update={"output": output.with_name("other")}))
    assert sorted(wandb.runs) == ["run1", "run3"]


def test_an_id_left_by_a_run_without_a_step_is_not_taken_up(
    settings: Settings, wandb: FakeWandb, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "wandb-run.txt").write_text("old\n")
    for each in opened(settings, tmp_path / "out", "wandb"):
        each.close()
    assert list(wandb.runs) == ["run1"]
    assert (tmp_path / "out" / "wandb-run.txt").read_text() == "run1\n"


def test_captions_of_videos(settings: Settings, wandb: FakeWandb, tmp_path: Path) -> None:
    trackers = opened(settings, tmp_path / "out", "wandb")
    trackers[1].validation(1, result(tmp_path / "out", 1, 0.5))
    for each in trackers:
        each.close()
    (only,) = wandb.runs.values()
    assert only.history[0][1]["samples/000"].caption == "a meadow"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("api_key not configured\n  (no-tty)."), "api_key not configured (no-tty)."),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_run_that_cannot_be_opened_is_told_in_one_line(
    settings: Settings, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], error: Exception, reason: str,
) -> None:  # fmt: skip
    def refuse(**_: Any) -> FakeRun:
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    config = settings(report_to=["wandb"], steps=1)
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert caught.value.message == f"--report-to wandb: {reason}"
    assert caught.value.hint == "Run wandb login, or set WANDB_MODE=offline."
    assert not (tmp_path / "run" / "wandb-run.txt").exists()
    flags = ["--shards", str(config.shards), "--output", str(tmp_path / "other"), "--steps=1", "--device=cpu"]
    assert run(["train", *flags, "--report-to", "wandb"]) == 2
    said = capsys.readouterr().err
    assert "--report-to wandb:" in said
    assert "Traceback" not in said
