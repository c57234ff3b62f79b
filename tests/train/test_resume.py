"""A run that is stopped and resumed equals one that never was; what does not fit is refused.

Mutations tried, each caught: optimizer moments not restored; gradients not cleared; metrics not cut back;
checksums not looked at.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError, ConfigError, MismatchError, StoppedError, StorageError
from cogcache.train import train
from cogcache.train.report import Report

Settings = Callable[..., TrainConfig]
LORA = "pytorch_lora_weights.safetensors"


def test_killed_runs_end_like_undisturbed_ones(
    settings: Settings, make_cache: Any, train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    """At least 20 SIGKILLs at random moments, each followed by the same command with --resume latest."""
    config = settings(
        shards=make_cache("2b"),
        output=tmp_path / "whole",
        steps=6,
        batch_size=2,
        checkpoint_every=1,
        keep_checkpoints=2,
        workers=1,
        lora_dropout=0.1,
        caption_dropout=0.3,
        resume="latest",
    )
    codes, seconds = train_server.run(config)
    assert codes == [0]
    draw, kills = random.Random(0), 0
    while kills < 20:
        output = tmp_path / f"killed-{kills}"
        codes = [-9]
        for _ in range(40):
            kill_after = draw.uniform(0.02, 1.0) * seconds
            codes, _ = train_server.run(config.model_copy(update={"output": output}), kill_after=kill_after)
            if codes == [0]:
                break
            assert codes == [-signal.SIGKILL], train_server.log.read_text()
            kills += 1
        else:
            codes, _ = train_server.run(config.model_copy(update={"output": output}))
        assert codes == [0], train_server.log.read_text()
        assert (output / LORA).read_bytes() == (config.output / LORA).read_bytes()
        assert metrics(output) == metrics(config.output)
        shutil.rmtree(output)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_signal_finishes_the_step_saves_and_stops(
    settings: Settings, tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole = train(settings(output=tmp_path / "whole", steps=5))
    stopped = settings(output=tmp_path / "stopped", steps=5)
    report = Report.step

    def step(self: Report, plan: Any, result: Any) -> None:
        report(self, plan, result)
        if plan.number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", step)
        with pytest.raises(StoppedError, match=rf"after step {stop_at + 1} of 5") as caught:
            train(stopped)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = train(stopped.model_copy(update={"resume": "latest"}))
    assert resumed.lora.read_bytes() == whole.lora.read_bytes()
    assert metrics(resumed.output) == metrics(whole.output)


def test_resuming_from_a_named_checkpoint_cuts_the_metrics_back(settings: Settings, metrics: Any) -> None:
    config = settings(steps=4, checkpoint_every=1, keep_checkpoints=0)
    first = train(config)
    expected, content = metrics(first.output), first.lora.read_bytes()
    with (first.output / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    again = train(config.model_copy(update={"resume": str(first.output / "checkpoint-000002")}))
    assert metrics(again.output) == expected
    assert again.lora.read_bytes() == content


def test_a_run_can_be_lengthened_and_rerun_when_done(settings: Settings, tmp_path: Path) -> None:
    whole = train(settings(output=tmp_path / "whole", steps=5))
    short = settings(output=tmp_path / "short", steps=3, checkpoint_every=2)
    train(short)
    longer = train(short.model_copy(update={"steps": 5, "resume": "latest"}))
    assert longer.lora.read_bytes() == whole.lora.read_bytes()
    done = train(short.model_copy(update={"steps": 5, "resume": "latest"}))
    assert done.loss is None
    assert done.lora.read_bytes() == whole.lora.read_bytes()


def test_the_same_global_batch_may_be_dealt_anew(settings: Settings, tmp_path: Path, metrics: Any) -> None:
    config = settings(steps=4, batch_size=2, checkpoint_every=2, eps=1e-2)
    train(config.model_copy(update={"output": tmp_path / "whole"}))
    train(config.model_copy(update={"steps": 2}))
    train(config.model_copy(update={"batch_size": 1, "grad_accum": 2, "resume": "latest"}))
    for ours, whole in zip(metrics(config.output), metrics(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_latest_starts_fresh_where_nothing_is_and_says_so(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(steps=1, resume="latest"))
    assert "NOTICE" in capsys.readouterr().err


def test_a_missing_named_checkpoint_is_an_error(settings: Settings, tmp_path: Path) -> None:
    config = settings(resume=str(tmp_path / "run" / "checkpoint-000100"))
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_elsewhere_does_not_write_over_a_run(settings: Settings, tmp_path: Path) -> None:
    train(settings(steps=1, checkpoint_every=1))
    train(settings(steps=1, output=tmp_path / "other"))
    elsewhere = str(tmp_path / "run" / "checkpoint-000001")
    with pytest.raises(ConfigError, match="already holds a run"):
        train(settings(steps=2, output=tmp_path / "other", resume=elsewhere))
    whole = train(settings(steps=2, output=tmp_path / "whole"))
    branch = train(settings(steps=2, output=tmp_path / "branch", resume=elsewhere))
    assert branch.lora.read_bytes() == whole.lora.read_bytes()


def test_a_failing_write_stops_with_a_clear_error_and_no_half_checkpoint(
    settings: Settings, tmp_path: Path
) -> None:
    """A limit on file sizes lets the LoRA (22 kB) through and stops the optimizer's file (46 kB)."""
    config = settings(steps=2, checkpoint_every=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"optimizer\.safetensors cannot be written"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run" / "checkpoint-000001").exists()
    assert train(config.model_copy(update={"resume": "latest"})).loss
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_output_folder_that_holds_a_run_is_refused(settings: Settings) -> None:
    train(settings(steps=1))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(settings(steps=1))
    with pytest.raises(ConfigError, match="finished LoRA and no checkpoint"):
        train(settings(steps=1, resume="latest"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"rank": 4}, "rank"),
        ({"lr": 0.5}, "lr"),
        ({"batch_size": 2}, "global_batch"),
        ({"target_modules": ["to_q"]}, "target_modules"),
        ({"shards": None}, "shards_fingerprint"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_field_by_field(
    settings: Settings, make_cache: Any, change: dict[str, Any], field: str
) -> None:
    train(settings(steps=1, checkpoint_every=1))
    if "shards" in change:
        change = {"shards": make_cache("5b", seed=9)}
    with pytest.raises(MismatchError) as caught:
        train(settings(steps=2, checkpoint_every=1, resume="latest", **change))
    assert list(caught.value.differences) == [field]


def test_steps_may_not_change_where_the_learning_rate_depends_on_them(settings: Settings) -> None:
    train(settings(steps=2, checkpoint_every=1, lr_scheduler="cosine"))
    with pytest.raises(MismatchError) as caught:
        train(settings(steps=4, checkpoint_every=1, lr_scheduler="cosine", resume="latest"))
    assert caught.value.differences == {"steps": (2, 4)}


def test_settings_that_change_no_number_may_change(settings: Settings) -> None:
    train(settings(steps=1, checkpoint_every=1))
    free = {"workers": 2, "checkpoint_every": 5, "keep_checkpoints": 1, "log_every": 2, "steps": 2}
    assert train(settings(resume="latest", gradient_checkpointing=True, **free)).loss


def test_a_checkpoint_past_the_steps_is_refused(settings: Settings) -> None:
    train(settings(steps=3, checkpoint_every=3))
    with pytest.raises(CheckpointError, match="past --steps 2"):
        train(settings(steps=2, resume="latest"))


def test_the_oldest_checkpoints_are_deleted(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "checkpoint-000009.tmp").mkdir(parents=True)
    train(settings(steps=5, checkpoint_every=1, keep_checkpoints=2))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-000004",
        "checkpoint-000005",
    ]


@pytest.mark.parametrize("name", [LORA, "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_and_latest_takes_the_newest_good_one(
    settings: Settings, tmp_path: Path, name: str, damage: str
) -> None:
    config = settings(steps=3, checkpoint_every=1)
    whole = train(config).lora.read_bytes()
    newest = tmp_path / "run" / "checkpoint-000003"
    content = bytearray((newest / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
    (newest / name).write_bytes(content[: -7 if damage == "cut" else None])
    if damage == "gone":
        (newest / name).unlink()
    with pytest.raises(CheckpointError, match="checkpoint-000003 is damaged"):
        train(config.model_copy(update={"resume": str(newest)}))
    assert train(config.model_copy(update={"resume": "latest"})).lora.read_bytes() == whole


def test_when_all_checkpoints_are_damaged_latest_says_so(settings: Settings, tmp_path: Path) -> None:
    train(settings(steps=1, checkpoint_every=1))
    (tmp_path / "run" / "checkpoint-000001" / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is undamaged"):
        train(settings(steps=1, resume="latest"))


def test_checkpoints_hold_nothing_pickled_and_load_in_stock_diffusers(
    settings: Settings, tiny_models: Any, tmp_path: Path
) -> None:
    from diffusers import CogVideoXPipeline

    train(settings(steps=1, checkpoint_every=1))
    folder = tmp_path / "run" / "checkpoint-000001"
    assert sorted(p.name for p in folder.iterdir()) == ["optimizer.safetensors", LORA, "trainer_state.json"]
    assert json.loads((folder / "trainer_state.json").read_text())["step"] == 1
    pipe = CogVideoXPipeline.from_pretrained(tiny_models("5b"))
    pipe.load_lora_weights(folder)
    assert pipe.get_active_adapters()
