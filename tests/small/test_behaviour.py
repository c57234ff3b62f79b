"""A LoRA works: on a model with trained weights it teaches what the base never saw, and no more than that.

The concept is the pink star: no clip that the base was trained on is pink or shows a star. The LoRA is trained on pink
stars and, so that nothing is forgotten, on as many scenes that the base knows (`cogcache.small.concept`). No caption
that is measured by was trained on.

Thresholds stand here with their reasons, as they were stated with earlier weights and other scenes in view; beside them
what was measured with the weights of the package, on a CPU. (b) takes a longer training, some twelve minutes on two
cores, and is run by name: ``pytest -m slow tests/small/test_behaviour.py``.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from behaviour_kit import Behaviour, Generated, generate, middle, psnr

from cogcache.cli import run
from cogcache.small import Kind, Scene, render

pytestmark = pytest.mark.timeout(1500)  # whoever comes first trains and generates

FALLS_BY = 0.20
"""(a) The loss of held-out clips of the concept falls by this share of the base's: the base's loss of what it knows is
a fifth of that, so a fall of 0.8 is the most to be hoped for. Measured: 0.0453 -> 0.0181, 0.60."""

STAYS_WITHIN = 0.20
"""(c) The loss of other clips moves by at most this share. The base was trained on them to the end, so that any change
of its weights is one for the worse. Measured: 0.0090 -> 0.0102, 0.14; a 22nd of what the concept's loss falls."""

COLOUR_AT_LEAST, BASE_COLOUR_AT_MOST = 0.20, 0.10
"""(b) Mean share of the right amount of pink. The base has no pink and shows none but by chance; a LoRA that shows half
the captions in half the amount reaches a quarter. Measured: base 0.00, LoRA 0.72 (standard error 0.12)."""

AWAY_AT_MOST, BASE_AWAY_AT_LEAST = 0.20, 0.30
"""(b) Mean distance from where the caption puts the shape; a half is counted where no pink is seen. The way of a shape
is a quarter of the picture to either side of the middle. Measured: base 0.50, LoRA 0.036 (0.008)."""

TINT_AT_MOST = 110.0
"""(b) Mean distance of the shape's colour from pink, in sRGB: white, the nearest that the base knows, is 126 away.
Measured: base 213, LoRA 92 (8)."""

WRONG_ALPHAS = (0.25, 8.0)
"""Alpha as a file may say it wrongly, times the right one. Measured (colour, distance, tint): a quarter shows no pink,
0.00, 0.50, 211; eight times shows it far too strong, 0.63, 0.09, 159. Four times, as which a file without alpha would
be applied here, fails narrowly, 0.73, 0.06, 114: too narrowly to be a test. Twice passes, 0.86, 0.04, 80."""

FIRST_FRAME_DB = 22.0
"""The first frame of image-to-video comes near the picture it was given; the VAE alone reaches some dB more.
Measured: 31.0 and 32.4, and 9.4 to 9.7 from the other one's."""

DECODED_DB = 26.0
"""Clips decoded from their cached latents; the recipe aims at 28 dB on clips it held out, and pink is new to it.
Measured: 32.8 to 37.1."""


KNOWN_COLOUR_AT_LEAST = 0.4
"""The base models show what a caption of known words says; distances as in (b). Of 40 scenes, four fifths had the right
colour and motion (`benchmarks/records/2026-11-30-small-model.md`). Measured here: 0.96, 0.03
for t2v, 0.87, 0.09 for t2v-1.5."""


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


@pytest.mark.parametrize("kind", [pytest.param("t2v", marks=pytest.mark.slow), "t2v-1.5"])
def test_the_base_follows_captions(behaviour: Behaviour, kind: Kind) -> None:
    scenes = [
        Scene("circle", "red", "large", "moves from left to right", "grey", 3),
        Scene("square", "yellow", "large", "moves down", "dark blue", 3),
        Scene("ring", "cyan", "large", "moves up", "brown", 3),
        Scene("cross", "white", "small", "stays still in the middle", "black", 3),
    ]
    made = generate(behaviour.pipeline(kind), [scene.caption for scene in scenes])
    videos = [Generated(middle(scene), frames) for scene, frames in zip(scenes, made, strict=True)]
    exchanged = [Generated(middle(scene), frames) for scene, frames in zip(scenes[::-1], made, strict=True)]
    print(kind, "colour, away, tint:", means(videos), "for the other's:", means(exchanged))
    colour, away, _ = means(videos)
    assert colour >= KNOWN_COLOUR_AT_LEAST
    assert away <= AWAY_AT_MOST
    assert means(exchanged)[0] < KNOWN_COLOUR_AT_LEAST


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
    assert run(["verify", str(behaviour.shards), "--decode", "2", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["decoded"]
    assert len(rows) == 2
    assert all(row["psnr_db"] >= DECODED_DB for row in rows), rows
