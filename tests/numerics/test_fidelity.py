"""Training against the installed pipelines and schedulers, for all five families; and the proof that the checks bite.

The second half breaks the trainer on purpose, one way at a time, and asserts that the checks notice. Mutations
tried, each caught: see ``MUTATIONS``, which is the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fidelity_checks
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from stock_pipelines import Stock

from cogcache.errors import GeometryError
from cogcache.geometry import Size
from cogcache.tiny import FAMILIES, Family
from cogcache.train import data, model, objective, tasks
from cogcache.variants import Variant, read_variant

Models = Callable[[Family], Path]
Shape = tuple[int, Size]
DEFAULT: Shape = (17, Size(64, 96))
OTHER: Shape = (9, Size(32, 80))
CASES = [(f, s) for f in FAMILIES for s in (DEFAULT, OTHER) if f != "5b-i2v" or s == DEFAULT]


@pytest.fixture(scope="session")
def stocks(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family, Shape], Stock]:
    """Stock sides, made once a session, before anything is broken."""
    made: dict[tuple[Family, Shape], Stock] = {}

    def stock(family: Family, shape: Shape) -> Stock:
        if (family, shape) not in made:
            folder = tmp_path_factory.mktemp("lora")
            made[family, shape] = Stock(tiny_models(family), *shape, folder)
        return made[family, shape]

    return stock


@pytest.mark.parametrize(("family", "shape"), CASES, ids=str)
@pytest.mark.parametrize("check", ["inputs", "loss", "gradients", "round_trip", "precision"])
def test_training_sees_what_the_pipeline_shows(
    stocks: Callable[[Family, Shape], Stock], family: Family, shape: Shape, check: str
) -> None:
    getattr(fidelity_checks, check)(stocks(family, shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_draw_is_the_samples_own(tiny_models: Models, family: Family) -> None:
    fidelity_checks.draws(read_variant(tiny_models(family)))


@pytest.mark.parametrize("shape", [(17, Size(64, 64)), (9, Size(64, 96))])
def test_learned_positions_refuse_what_the_stock_model_refuses_or_swaps(
    tiny_models: Models, tmp_path: Path, shape: Shape
) -> None:
    """The allowed size is named; diffusers itself raises at other sizes and swaps positions at other lengths."""
    root = tiny_models("5b-i2v")
    with pytest.raises(GeometryError, match="learned positions") as caught:
        read_variant(root).check_clip(*shape)
    assert caught.value.hint in ("The only size allowed is 64x96.", "The only count allowed is 17.")
    if shape[1] != Size(64, 96):
        with pytest.raises(ValueError, match="different resolution"):
            Stock(root, *shape, tmp_path)


@dataclass(frozen=True)
class Mutation:
    """One way to be wrong: what to replace, which checks notice, with which families and at which size.

    ``make`` gets the original and returns what replaces it; ``fresh`` ones also break the file of the LoRA.
    """

    place: tuple[Any, str]
    make: Callable[[Any], Any]
    families: tuple[Family, ...]
    checks: tuple[str, ...] = ("inputs",)
    shape: Shape = DEFAULT
    fresh: bool = False


V1: tuple[Family, ...] = ("2b", "5b", "5b-i2v")
V15: tuple[Family, ...] = ("1.5-5b", "1.5-5b-i2v")
I2V: tuple[Family, ...] = ("5b-i2v", "1.5-5b-i2v")
ALL = FAMILIES


def _rescaled(power: int, inverted_only: bool = False) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def mutant(latents: Any, noise: Any, variant: Variant) -> Any:
            wrong = variant.invert_scale_latents or not inverted_only
            return original(latents, noise, variant) * (variant.scaling_factor**power if wrong else 1)

        return mutant

    return make


def _appended(_: Any) -> Any:
    def mutant(latents: Any, patch: int | None) -> Any:
        missing = objective.padded_frames(latents.shape[1], patch) - latents.shape[1]
        return torch.cat([latents, latents[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)

    return mutant


def _zero_padding(original: Any) -> Any:
    def mutant(latents: Any, patch: int | None) -> Any:
        padded = original(latents, patch).clone()
        padded[:, : padded.shape[1] - latents.shape[1]] = 0
        return padded

    return mutant


def _condition(change: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
    """Changes what ``model_input`` gives; ``change`` gets [B, P, 2C, H, W] and C."""

    def make(original: Any) -> Any:
        def mutant(self: Any, noisy: Any, image: Any, variant: Variant, dtype: Any) -> Any:
            hidden, extra = original(self, noisy, image, variant, dtype)
            return change(hidden, variant.latent_channels), extra

        return mutant

    return make


def _behind_the_padding(hidden: Any, c: int) -> Any:
    return torch.cat([hidden[:, :, :c], hidden[:, :, c:].roll(1, dims=1)], dim=2)


def _everywhere(hidden: Any, c: int) -> Any:
    return torch.cat([hidden[:, :, :c], hidden[:, :1, c:].expand_as(hidden[:, :, c:])], dim=2)


def _swapped(hidden: Any, c: int) -> Any:
    return hidden.roll(c, dims=2)


def _slice_rope(_: Any) -> Any:
    def mutant(v: Variant, frames: int, height: int, width: int, device: Any) -> Any:
        grid = (height // v.patch_size, width // v.patch_size)
        return get_3d_rotary_pos_embed(
            v.attention_head_dim, None, grid, frames, grid_type="slice", max_size=grid, device=device
        )

    return mutant


def _cropped_rope(original: Any) -> Any:
    def mutant(v: Variant, frames: int, *rest: Any) -> Any:
        return original(v.model_copy(update={"patch_size_t": None}), frames // 2, *rest)

    return mutant


def _frame_rope(original: Any) -> Any:
    return lambda v, frames, *rest: original(v, 2 * frames, *rest)


def _scheduler_without(**facts: Any) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        return lambda scheduler, device: original(
            type(scheduler).from_config({**scheduler.config, **facts}), device
        )

    return make


def _bfloat16(original: Any) -> Any:
    """As the scheduler does it with bfloat16 latents."""
    return lambda clean, noise, abar: original(clean.bfloat16(), noise.bfloat16(), abar.bfloat16()).float()


def _alpha_is_rank(original: Any) -> Any:
    def mutant(path: Any, tensors: Any, *, lora_config: Any, **more: Any) -> Any:
        return original(path, tensors, lora_config={**lora_config, "lora_alpha": lora_config["r"]}, **more)

    return mutant


def _trained_at_rank(original: Any) -> Any:
    def mutant(transformer: Any, config: Any) -> None:
        original(transformer, config)
        for module in transformer.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] = 1.0

    return mutant


def _company(original: Any) -> Any:
    """Draws that forget whose they are: one for the whole batch."""
    return lambda self, epoch, record, *rest: original(
        self, epoch, record.model_copy(update={"id": ""}), *rest
    )


def _one_for(*purposes: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        shared = _company(original)
        return lambda self, epoch, record, purpose, *rest: (shared if purpose in purposes else original)(
            self, epoch, record, purpose, *rest
        )

    return make


def _first_epoch(original: Any) -> Any:
    return lambda self, _epoch, *rest: original(self, 0, *rest)


def _batch_mean(original: Any) -> Any:
    def mutant(*given: Any, **more: Any) -> Any:
        losses = original(*given, **more)
        return losses.mean().expand_as(losses)

    return mutant


def _noiseless(_: Any) -> Any:
    return lambda moments, _noise: moments.float().chunk(2, dim=1)[0]


SCALED = (objective, "_clean_latents")
NOISED = (objective, "add_noise")
TARGET = (objective, "velocity")
PADDED = (objective, "pad_front")
ALPHAS = (objective, "alphas_cumprod")
ROTARY = (objective, "rotary_tables")
IMAGE = (tasks.ImageToVideo, "model_input")
NORMAL = (data.Samples, "_normal")
UNIFORM = (data.Samples, "_uniform")
SEEN = ("inputs", "loss")
AROUND = ("inputs", "loss", "round_trip")

MUTATIONS = {
    "latents divided by the scaling factor": Mutation(SCALED, _rescaled(-2), ALL, AROUND),
    "latents not scaled": Mutation(SCALED, _rescaled(-1), ALL, ("inputs", "round_trip")),
    "latents not scaled where invert_scale_latents is set": Mutation(
        SCALED, _rescaled(-1, True), V15, ("inputs", "round_trip")
    ),
    "posterior mean instead of a sample": Mutation((objective, "sample_posterior"), _noiseless, ALL, AROUND),
    "padding appended": Mutation(PADDED, _appended, V15, AROUND),
    "padding with zeros": Mutation(PADDED, _zero_padding, V15, SEEN),
    "no SNR shift": Mutation(
        ALPHAS,
        _scheduler_without(snr_shift_scale=1.0),
        ("2b",),
        ("inputs", "loss", "round_trip", "precision"),
    ),
    "SNR shift where there is none": Mutation(
        ALPHAS, _scheduler_without(snr_shift_scale=3.0), ("5b", "1.5-5b-i2v"), SEEN
    ),
    "no zero terminal SNR": Mutation(
        ALPHAS, _scheduler_without(rescale_betas_zero_snr=False), ALL, ("inputs", "precision")
    ),
    "noise added in bfloat16": Mutation(NOISED, _bfloat16, ALL, ("inputs", "precision")),
    "target rounded to bfloat16": Mutation(TARGET, _bfloat16, ALL, ("precision",)),
    "v with its signs swapped": Mutation(
        TARGET, lambda f: lambda *a: -f(*a), ALL, ("loss", "gradients", "round_trip")
    ),
    "noise as the target": Mutation(
        TARGET, lambda _: lambda _clean, noise, _abar: noise, ALL, ("loss", "round_trip")
    ),
    "one loss for the batch": Mutation((objective, "loss_per_sample"), _batch_mean, ALL, ("loss",)),
    "slice positions for 1.0": Mutation(ROTARY, _slice_rope, ("5b",), ("inputs", "loss", "gradients"), OTHER),
    "stretched positions for 1.5": Mutation(ROTARY, _cropped_rope, V15, SEEN, OTHER),
    "positions for every frame of 1.5": Mutation(ROTARY, _frame_rope, V15),
    "no positions": Mutation(ROTARY, lambda _: lambda *_: None, ("5b", "5b-i2v", *V15), SEEN),
    "ofs missing": Mutation((tasks, "_ofs"), lambda _: lambda *_: {}, ("1.5-5b-i2v",)),
    "ofs of another value": Mutation(
        (tasks, "OFS"), lambda _: 1.0, ("1.5-5b-i2v",), ("inputs", "loss", "gradients")
    ),
    "image latent multiplied where the pipeline divides": Mutation(
        (tasks, "image_scale"), lambda _: lambda v: v.scaling_factor, ("1.5-5b-i2v",), SEEN
    ),
    "image latent divided where the pipeline multiplies": Mutation(
        (tasks, "image_scale"), lambda _: lambda v: 1 / v.scaling_factor, ("5b-i2v",), SEEN
    ),
    "image behind the padding": Mutation(IMAGE, _condition(_behind_the_padding), I2V, SEEN),
    "image in every frame": Mutation(IMAGE, _condition(_everywhere), I2V, SEEN),
    "image before the noisy latent": Mutation(IMAGE, _condition(_swapped), I2V, SEEN),
    "alpha not in the file": Mutation(
        (model, "save_lora"), _alpha_is_rank, ("2b", "1.5-5b-i2v"), ("loss", "gradients"), OTHER, fresh=True
    ),
    "alpha ignored in training": Mutation(
        (model, "add_lora"), _trained_at_rank, ("2b", "1.5-5b-i2v"), ("loss", "gradients"), OTHER, fresh=True
    ),
    "one noise for the batch": Mutation(NORMAL, _one_for("noise"), ALL, ("draws",)),
    "one posterior draw for the batch": Mutation(NORMAL, _one_for("posterior"), ALL, ("draws",)),
    "one timestep for the batch": Mutation((data.Samples, "timestep"), _company, ALL, ("draws",)),
    "one draw of the image bank for the batch": Mutation(UNIFORM, _one_for("image"), I2V, ("draws",)),
    "one image dropout for the batch": Mutation(UNIFORM, _one_for("image dropout"), I2V, ("draws",)),
    "one caption dropout for the batch": Mutation(UNIFORM, _one_for("caption"), ALL, ("draws",)),
    "the same noise in every epoch": Mutation(NORMAL, _first_epoch, ALL, ("draws",)),
    "the same timesteps and dropouts in every epoch": Mutation(UNIFORM, _first_epoch, ALL, ("draws",)),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_each_mistake_is_noticed(
    stocks: Callable[[Family, Shape], Stock],
    tiny_models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutation: Mutation,
) -> None:
    for family in mutation.families:
        shape = mutation.shape
        stock = None if mutation.fresh or mutation.checks == ("draws",) else stocks(family, shape)
        with monkeypatch.context() as patch:
            owner, name = mutation.place
            patch.setattr(owner, name, mutation.make(owner.__dict__[name]))
            if mutation.fresh:
                folder = tmp_path / family
                folder.mkdir()
                stock = Stock(tiny_models(family), *shape, folder)
            for check in mutation.checks:
                subject = stock or read_variant(tiny_models(family))
                with pytest.raises(AssertionError):
                    getattr(fidelity_checks, check)(subject)
