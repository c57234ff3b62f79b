"""A LoRA works: on a model with trained weights it teaches what the base never saw, and no more than that.

The concept is the pink star: no clip that the base was trained on is pink or shows a star. The LoRA is trained on pink
stars and, so that nothing is forgotten, on as many scenes that the base knows (`cogcache.small.concept`). No caption
that is measured by was trained on.

Thresholds stand here with their reasons, and beside them what was measured, on a CPU, with a first version of the
weights that is not in the package (transformer trained for 6,000 steps of 64 clips). (b) takes a longer training, some
ten minutes on two cores, and is run by name: ``pytest -m slow tests/small/test_behaviour.py``.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from behaviour_kit import Behaviour, Generated, generate, psnr

from cogcache.cli import run
from cogcache.small import Scene, render

pytestmark = pytest.mark.timeout(1500)  # whoever comes first trains and generates

FALLS_BY = 0.20
"""(a) The loss of held-out clips of the concept falls by this share of the base's: the base's loss of what it knows is
two fifths of that, so a fall of 0.6 is the most to be hoped for. Measured: 0.0371 -> 0.0240, 0.35."""

STAYS_WITHIN = 0.20
"""(c) The loss of other clips moves by at most this share. The base was trained on them to the end, so that any change
of its weights is one for the worse. Measured: 0.0145 -> 0.0162, 0.12; an eighth of what the concept's loss falls."""

COLOUR_AT_LEAST, BASE_COLOUR_AT_MOST = 0.20, 0.10
"""(b) Mean share of the right amount of pink. The base has no pink and shows none but by chance; a LoRA that shows half
the captions in half the amount reaches a quarter. Measured: base 0.00, LoRA 0.33."""

AWAY_AT_MOST, BASE_AWAY_AT_LEAST = 0.20, 0.30
"""(b) Mean distance from where the caption puts the shape; a half is counted where no pink is seen. The way of a shape
is a quarter of the picture to either side of the middle. Measured: base 0.46, LoRA 0.12."""

TINT_AT_MOST = 110.0
"""(b) Mean distance of the shape's colour from pink, in sRGB: white, the nearest that the base knows, is 126 away.
Measured: base 178, LoRA 88."""

WRONG_ALPHAS = (0.25, 8.0)
"""Alpha as a file may say it wrongly, times the right one. Measured (colour, distance, tint): a quarter shows no pink,
0.00, 0.44, 162; eight times is broken, 0.17, 0.31, 152. Four times fails by a hair, 0.48, 0.21, 109: with guidance it
shows more pink in large stars, and none in small ones; so it is no test."""

FIRST_FRAME_DB = 22.0
"""The first frame of image-to-video comes near the picture it was given; the VAE alone reaches some dB more. Not
measured yet: there is no trained image-to-video model."""

DECODED_DB = 26.0
"""Clips decoded from their cached latents; the recipe aims at 28 dB on clips it held out, and pink is new to it.
Measured: 28.3 to 32.0."""


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def means(videos: list[Generated]) -> tuple[float, float, float]:
    """Colour, distance and tint, each the mean over seeds and captions."""
    colour, away, tint = (
        spread([getattr(v, name) for v in videos])[0] for name in ("colour", "away", "tint")
    )
    return colour, away, tint


def close_enough(videos: list[Generated]) -> bool:
    """The threshold of (b)."""
    colour, away, tint = means(videos)
    return colour >= COLOUR_AT_LEAST and away <= AWAY_AT_MOST and tint <= TINT_AT_MOST


def test_a_the_loss_of_held_out_clips_of_the_concept_falls(behaviour: Behaviour) -> None:
    base, lora = behaviour.losses(None)["new"], behaviour.losses(1.0)["new"]
    print(f"held-out, new: {base:.4f} -> {lora:.4f}")
    assert lora < (1 - FALLS_BY) * base


@pytest.mark.slow
def test_b_generations_come_closer_to_the_concept(behaviour: Behaviour) -> None:
    """By more than the spread over seeds and captions can explain."""
    base, lora = behaviour.videos(None), behaviour.videos(1)
    for name in ("colour", "away", "tint"):
        values = [[getattr(video, name) for video in videos] for videos in (base, lora)]
        print(name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in map(spread, values)), values)
        apart, error = spread([b - a for a, b in zip(*values, strict=True)])
        assert abs(apart) > 3 * error
    assert close_enough(lora)
    colour, away, _ = means(base)
    assert colour <= BASE_COLOUR_AT_MOST
    assert away >= BASE_AWAY_AT_LEAST


@pytest.mark.slow
@pytest.mark.parametrize("factor", WRONG_ALPHAS)
def test_b_fails_at_a_wrong_alpha(behaviour: Behaviour, factor: float) -> None:
    videos = behaviour.videos(factor)
    print("colour, away, tint:", means(videos))
    assert not close_enough(videos)


def test_c_other_captions_are_left_as_they_were(behaviour: Behaviour) -> None:
    base, lora = behaviour.losses(None)["known"], behaviour.losses(1.0)["known"]
    print(f"held-out, known: {base:.4f} -> {lora:.4f}")
    assert abs(lora - base) < STAYS_WITHIN * base


def test_d_half_the_scale_lies_between(behaviour: Behaviour) -> None:
    base, half, whole = (behaviour.losses(scale)["new"] for scale in (None, 0.5, 1.0))
    print(f"held-out, new, at scale 0, 0.5, 1: {base:.4f}, {half:.4f}, {whole:.4f}")
    assert behaviour.losses(0.0) == behaviour.losses(None)
    assert whole < half < base


def test_d_scale_0_is_the_base_and_e_fusing_and_saving_keep_the_lora(
    behaviour: Behaviour, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Few denoising steps tell as much as many about whether two models are one."""
    saved = tmp_path_factory.mktemp("saved")
    pipe, prompt = behaviour.pipeline(), [behaviour.concept.new_held_out[0].caption]

    def video() -> np.ndarray:
        return generate(pipe, prompt, steps=3)[0].astype(int)

    base = video()
    pipe.load_lora_weights(behaviour.lora(), adapter_name="pink")
    whole = video()
    pipe.set_adapters(["pink"], [0.0])
    assert np.array_equal(video(), base)
    pipe.set_adapters(["pink"], [0.5])
    half = video()
    assert 0 < np.abs(half - base).mean() < np.abs(whole - base).mean()

    pipe.set_adapters(["pink"], [1.0])
    assert np.array_equal(video(), whole)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert np.abs(video() - whole).max() <= 2  # sums in another order

    again = behaviour.pipeline()
    again.load_lora_weights(behaviour.lora(), adapter_name="pink")
    again.save_lora_weights(
        saved,
        transformer_lora_layers=_lora_layers(again.transformer),
        transformer_lora_adapter_metadata=again.transformer.peft_config["pink"].to_dict(),
    )
    pipe = behaviour.pipeline()
    pipe.load_lora_weights(saved, adapter_name="pink")
    assert np.array_equal(video(), whole)


def _lora_layers(transformer: object) -> dict[str, torch.Tensor]:
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer, adapter_name="pink")


def test_image_to_video_begins_with_its_image(behaviour: Behaviour) -> None:
    from PIL import Image

    scenes = [
        Scene("circle", "red", "large", "moves from left to right", "grey", 77),
        Scene("cross", "yellow", "small", "moves up", "dark blue", 78),
    ]
    real = [render(scene, 17, 96, 144) for scene in scenes]
    images = [Image.fromarray(clip[0]) for clip in real]
    pipe = behaviour.pipeline("i2v")
    made = [
        generate(pipe, [scene.caption], first_seed=seed, image=image)[0]
        for seed, (scene, image) in enumerate(zip(scenes, images, strict=True))
    ]
    reached = [psnr(video[0], clip[0]) for video, clip in zip(made, real, strict=True)]
    swapped = [psnr(video[0], clip[0]) for video, clip in zip(made, real[::-1], strict=True)]
    print("first frame:", reached, "with the other's:", swapped)
    assert min(reached) >= FIRST_FRAME_DB
    assert max(swapped) < FIRST_FRAME_DB


def test_verify_decodes_with_a_real_psnr(behaviour: Behaviour, capsys: pytest.CaptureFixture[str]) -> None:
    assert behaviour.shards
    capsys.readouterr()
    assert run(["verify", str(behaviour.shards), "--decode", "4", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["decoded"]
    assert len(rows) == 4
    assert all(row["psnr_db"] >= DECODED_DB for row in rows), rows
