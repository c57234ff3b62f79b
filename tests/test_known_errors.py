"""Mistakes that public trainers make, and the test that would notice each one here.

=========================================================  ==========================================================
mistake                                                    guarded by
=========================================================  ==========================================================
same file name in two folders: one silently wins           test_known_errors::test_equal_names_in_two_folders
embeddings found by the prompt's text alone                test_known_errors::test_other_weights_make_another_cache
a half-written cache file is taken as valid                test_encode_resume::test_kill_at_any_moment_changes_nothing,
                                                           test_cache_reader::test_missing_and_cut_shards
VAE, dtype, tiling or frame rule change, cache stays       test_encode_refusals::test_other_settings_never_mix,
                                                           test_known_errors::test_other_weights_make_another_cache
a clip changes, its latent stays                           test_encode_numerics::test_changed_clip_is_encoded_anew
an image changes, its condition stays                      test_images::test_listed_images_replace_first_frames_and_a_changed_one_is_encoded_anew_alone
blank lines dropped from each list on its own              test_datasets::test_all_mistakes_of_lists_at_once,
                                                           test_known_errors::test_a_blank_line_shifts_no_caption
97 frames become 49 by keeping the first half              test_known_errors::test_frames_are_sampled_over_the_clip
aspect ratio distorted                                     test_pictures::test_cover_crops_the_centre_and_pad_shows_all
no look at fps                                             test_load_clip::test_resampled
flags that are true when given False                       test_known_errors::test_false_is_false
gradients clipped at every microbatch                      test_train::test_accumulation_equals_a_bigger_batch_in_partial_batches_too
validation on microbatches and on step 0                   test_validation::test_when_it_validates
every process generates every validation prompt            test_validation::test_two_processes_share_the_work
resuming restarts the epoch                                test_resume::test_killed_runs_end_like_undisturbed_ones,
                                                           test_data::test_plans_go_on_in_the_middle_of_an_epoch
a missing resume path silently starts fresh                test_resume::test_a_missing_named_checkpoint_is_an_error
failures end with exit code 0                              test_encode_refusals::test_unreadable_clip_stops_nothing,
                                                           test_extract::test_unreadable_videos_are_listed_and_no_line_shifts
the same caption dropped in every epoch                    test_data::test_caption_dropout_is_drawn_anew_each_epoch
a shuffle that is the same in every epoch                  test_cache_plan::test_epochs_and_seeds_differ
alpha not saved: applied at twice its strength             test_lora::test_stock_pipeline_applies_the_trained_alpha
latents not scaled where invert_scale_latents is set       test_fidelity::test_each_mistake_is_noticed
padding appended at the end                                test_fidelity::test_each_mistake_is_noticed
slice positions for 1.0 models                             test_fidelity::test_each_mistake_is_noticed
image latent multiplied where the pipeline divides         test_fidelity::test_each_mistake_is_noticed
one posterior sample frozen for all epochs                 test_fidelity::test_each_mistake_is_noticed
noise of the image condition dropped                       test_images::test_noise_has_the_published_distribution
noise added in bfloat16                                    test_precision::test_noising_in_low_precision_is_wrong_at_small_timesteps
ZeRO-3 saves empty tensors                                 test_deepspeed::test_zero_3_is_refused_by_a_launch
=========================================================  ==========================================================
"""  # noqa: E501  a table

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.main
from making_videos import numbers, picture, write_video
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from cogcache import config as configs
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.config_io import load_config
from cogcache.errors import DatasetError, MismatchError
from cogcache.flags import config_command
from cogcache.geometry import Size
from cogcache.precompute import encode_all
from cogcache.precompute.datasets import find_clips
from cogcache.tiny import Family
from cogcache.video import ClipRequest, load_clip

COMMANDS = [
    kind for kind in vars(configs).values()
    if isinstance(kind, type) and issubclass(kind, configs.CommandConfig) and kind is not configs.CommandConfig
]  # fmt: skip
SWITCHES = [
    (kind, name) for kind in COMMANDS for name, f in kind.model_fields.items() if f.annotation is bool
]


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(test_\w+)::(test_\w+)", __doc__ or "")
    assert len(named) > 25
    for module, test in named:
        (path,) = Path(__file__).parent.rglob(f"{module}.py")
        assert f"def {test}(" in path.read_text("utf-8"), f"{module}::{test}"


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    """``a/clip.mp4`` and ``b/clip.mp4``, different, with equal captions."""
    root = tmp_path / "clips"
    for number, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        write_video(root / name / "clip.mp4", frames=9, image=lambda n, base=100 * number: picture(base + n))
        (root / name / "clip.txt").write_text("the same words")
    return root


@pytest.fixture
def settings(two_folders: Path, tiny_models: Callable[[Family], Path], tmp_path: Path) -> EncodeConfig:
    return EncodeConfig(
        data_root=two_folders, model=str(tiny_models("5b")), shards=tmp_path / "shards", frames=9, size="32x48",
        fps="source", device="cpu",
    )  # fmt: skip


def test_equal_names_in_two_folders(settings: EncodeConfig) -> None:
    result = encode_all(settings)
    reader = CacheReader(result.shards)
    assert sorted(row.source for row in reader.samples) == ["a/clip.mp4", "b/clip.mp4"]
    first, second = (reader.read("latents", row.latents).tensors["moments"] for row in reader.samples)
    assert not torch.equal(first, second)
    assert len({row.id for row in reader.samples}) == 2


@pytest.mark.parametrize(
    ("component", "file", "field"),
    [
        ("vae", "diffusion_pytorch_model.safetensors", "series.latents.vae_weights"),
        ("text_encoder", "model.safetensors", "series.text"),
    ],
)
def test_other_weights_make_another_cache(
    settings: EncodeConfig, tmp_path: Path, component: str, file: str, field: str
) -> None:
    """Equal prompts and clips, and one weight changed in its last bit: nothing old is used."""
    encode_all(settings)
    model = shutil.copytree(settings.model, tmp_path / "model")
    tensors = load_file(model / component / file)
    name = next(n for n, t in tensors.items() if t.ndim > 1)
    tensors[name].flatten()[:1].nextafter_(torch.tensor(10.0))
    save_file(tensors, model / component / file, {"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        encode_all(settings.model_copy(update={"model": str(model)}))
    assert [n for n in caught.value.differences if n.startswith(field)] == list(caught.value.differences)
    assert len(caught.value.differences) == 1


def test_a_blank_line_shifts_no_caption(two_folders: Path) -> None:
    """A blank line in each list, at different places, keeps the counts equal; it is refused all the same."""
    for path in two_folders.rglob("*.txt"):
        path.unlink()
    (two_folders / "videos.txt").write_text("a/clip.mp4\n\nb/clip.mp4\n")
    (two_folders / "prompts.txt").write_text("\nfirst\nsecond\n")
    with pytest.raises(DatasetError) as caught:
        find_clips(two_folders, "auto", False)
    assert any("videos.txt line 2: blank" in mistake for mistake in caught.value.mistakes)
    assert any("prompts.txt line 1: blank" in mistake for mistake in caught.value.mistakes)


def test_frames_are_sampled_over_the_clip(tmp_path: Path) -> None:
    """97 frames at 16 a second, 49 wanted at 8: every second one, from the first to the last."""
    video = write_video(tmp_path / "x.mp4", frames=97, fps=16)
    clip = load_clip(video, ClipRequest(49, Size(96, 160), fps=8))
    assert numbers(clip.frames.numpy()) == list(range(0, 97, 2))
    assert clip.facts["times_s"][-1] == pytest.approx(6.0)


@pytest.mark.parametrize(("kind", "name"), SWITCHES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [True, False])
def test_false_is_false(kind: type[BaseModel], name: str, value: bool, tmp_path: Path) -> None:
    """Every switch, by flag, by YAML, and by a YAML file that the flag overrules."""
    needed = {"data_root": ".", "model": "m", "shards": "s", "prompt": ["p"], "validate_every": 1}
    given = {key: value for key, value in needed.items() if key in kind.model_fields}
    seen: list[bool] = []
    app = typer.Typer(add_completion=False)
    app.command()(config_command(kind, lambda config: seen.append(getattr(config, name)), ""))
    flags = [f"--{key.replace('_', '-')}={v[0] if isinstance(v, list) else v}" for key, v in given.items()]
    flag = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    (tmp_path / "same.yaml").write_text(f"{name}: {'true' if value else 'false'}\n")
    (tmp_path / "other.yaml").write_text(f"{name}: {'false' if value else 'true'}\n")
    command = typer.main.get_command(app)
    command.main([*flags, flag], standalone_mode=False)
    command.main([*flags, f"--config={tmp_path / 'same.yaml'}"], standalone_mode=False)
    command.main([*flags, f"--config={tmp_path / 'other.yaml'}", flag], standalone_mode=False)
    seen.append(getattr(load_config(kind, {**given, name: str(value)}, None), name))
    assert seen == [value] * 4
