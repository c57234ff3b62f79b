"""Make the small CogVideoX from nothing: clips, VAE, text encoder, then three transformers on an encoded cache.

    python scripts/small_model/make.py WORK [--footage CLIPS] [--pictures PICTURES] [--quick] [--set vae=5000]

CLIPS and PICTURES are what ``footage.py`` makes; CLIPS can be a list of shots (``windows.py``), too.
Everything it makes stays in WORK; a part that is there is not made again. The transformers are trained by ``cogcache
encode`` and ``cogcache train --training-type full``, as any other model would be. ``--quick`` does some steps of
each, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from clips import choose_scenes, read_clips, write_clips
from networks import calibrate, psnr, train_text, train_vae
from pictures import read_pictures
from shown import Clips, Pictures, Source

from cogcache.demo.run import CLIPS
from cogcache.quiet import quiet_libraries
from cogcache.small.architecture import FRAMES, HEIGHT, KINDS, WIDTH, Kind, small_facts
from cogcache.tiny.tokenizer import write_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILE = ["--compile"] if torch.cuda.is_available() else []
TOGETHER = len(KINDS) if torch.cuda.is_available() else 1
"""Kinds made at once: so small a transformer is bound by the thread that launches it and leaves most of a GPU idle."""
ENCODERS = max(1, min(8, (os.cpu_count() or 1) // (2 * TOGETHER))) if torch.cuda.is_available() else 1
"""Processes that encode for each kind: two cores for each."""
FULL = {
    "clips": 2600, "held_out": 40, "text": 2000,
    "pictures": 5000, "pictures_batch": 64, "vae": 6300, "vae_batch": 8,
    "t2v": 9000, "i2v": 6000, "t2v-1.5": 8000, "batch": 64,
}  # fmt: skip
QUICK = {
    "clips": 24, "held_out": 4, "text": 3,
    "pictures": 2, "pictures_batch": 2, "vae": 2, "vae_batch": 2,
    "t2v": 2, "i2v": 2, "t2v-1.5": 2, "batch": 4,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--footage", type=Path, action="append", default=[])
    parser.add_argument("--pictures", type=Path, help="folder of pictures for the VAE; default: none")
    parser.add_argument(
        "--vae", type=Path, help="folder of a VAE that is trained already, as cogcache/small/weights/vae"
    )
    parser.add_argument(
        "--kinds",
        nargs="*",
        choices=KINDS,
        default=KINDS,
        help="default: all; none: only what they share",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=NUMBER", dest="changes",
        help=f"another number of steps, clips or pieces in a batch than {FULL}",
    )  # fmt: skip
    given = parser.parse_args()
    plan, work = {**(QUICK if given.quick else FULL), **dict(given.changes)}, given.work
    part(work / "clips", lambda out: make_clips(out, plan, given.footage))
    part(work / "shared", lambda out: make_shared(out, work / "clips", given.pictures, given.vae, plan))
    for kind in given.kinds:
        part(work / "start" / kind, lambda out, kind=kind: make_start(out, work, kind))
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(lambda kind: make_kind(work, kind, plan), given.kinds))


def setting(text: str) -> tuple[str, int]:
    """``vae=5000`` as a pair."""
    name, _, number = text.partition("=")
    if name not in FULL or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(FULL)} and a number")
    return name, int(number)


def part(out: Path, make: Callable[[Path], None]) -> None:
    """Make a folder, complete or not at all."""
    if out.exists():
        return
    started, staging = time.perf_counter(), out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    make(staging)
    staging.replace(out)
    print(f"made {out} in {time.perf_counter() - started:.0f} s", flush=True)


def make_clips(out: Path, plan: dict[str, int], footage: list[Path]) -> None:
    """What is learnt from, and two kinds that are not: scenes of the made-up world, and the demo's cuts."""
    workers = os.cpu_count() or 1
    scenes, held_out = choose_scenes(plan["clips"], plan["held_out"])
    write_clips(out / "train", scenes, footage, workers)
    write_clips(out / "held_out", held_out, [], workers)
    cuts = out / "cuts.jsonl"
    names, captions = (
        (CLIPS / name).read_text("utf-8").splitlines() for name in ("videos.txt", "prompts.txt")
    )
    cuts.write_text(
        "".join(
            json.dumps({"file": str(CLIPS / name), "start": 0.0, "end": 3.4, "caption": caption}) + "\n"
            for name, caption in zip(names, captions, strict=True)
        )
    )
    write_clips(out / "held_out_film", [], [cuts], workers)


def kinds_to_show(scenes: torch.Tensor, film: torch.Tensor, pictures: Path | None) -> list[Source]:
    """Of eight pieces one is of the made-up world, three are film and four pictures: these are far harder to draw."""
    known, moving = (Clips(clips.to(DEVICE)) for clips in (scenes, film))
    still = Pictures(torch.from_numpy(read_pictures(pictures)).to(DEVICE)) if pictures else moving
    return [kind for kind in (known, still, moving, still, moving, still, moving, still) if len(kind)]


def make_shared(
    out: Path, clips: Path, pictures: Path | None, trained: Path | None, plan: dict[str, int]
) -> None:
    """VAE, tokenizer and text encoder, float32, with what they reach.

    Args:
        trained: Folder of a VAE that is taken as it is.
    """
    from diffusers import AutoencoderKLCogVideoX
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    facts = small_facts("t2v")
    scenes, film = (read(clips / "train", pattern) for pattern in ("[0-9]*.mp4", "footage-*.mp4"))
    reached: dict[str, Any] = {}
    if trained:
        vae = AutoencoderKLCogVideoX.from_pretrained(trained, dtype=torch.float32).to(DEVICE)
    else:
        vae = AutoencoderKLCogVideoX(**facts.vae())
        kinds = kinds_to_show(scenes, film, pictures)
        for phase, frames in (("pictures", 1), ("vae", FRAMES)):  # of pictures, 17 times as many in the time
            size = (frames, 64, 96)
            train_vae(vae, kinds, DEVICE, steps=plan[phase], batch=plan[f"{phase}_batch"], crop=size)
        some = torch.cat([kind[:: max(1, len(kind) // 32)] for kind in (scenes, film) if len(kind)])
        reached["spread_of_latents"] = calibrate(vae, some, DEVICE, facts.scaling_factor)
    for name in ("held_out", "held_out_film"):
        reached[f"psnr_db_{name}"] = mean(psnr(vae, read(clips / name, "*.mp4"), DEVICE))
    if len(film):
        reached["psnr_db_film_learned_from"] = mean(psnr(vae, film[:: max(1, len(film) // 40)], DEVICE))
    captions = [
        json.loads(line)["text"] for line in (clips / "train" / "metadata.jsonl").read_text().splitlines()
    ]
    write_tokenizer(out / "tokenizer", facts.text_length, sorted(set(captions)))
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    encoder = T5EncoderModel(T5Config(**facts.text_encoder(len(tokenizer))))
    train_text(encoder, tokenizer, sorted(set(captions)), DEVICE, steps=plan["text"], batch=256)
    vae.save_pretrained(out / "vae")
    encoder.save_pretrained(out / "text_encoder")
    (out / "reached.json").write_text(json.dumps(reached, indent=2) + "\n")
    print(reached, flush=True)


def read(folder: Path, pattern: str) -> torch.Tensor:
    return torch.from_numpy(read_clips(sorted((folder / "videos").glob(pattern)), os.cpu_count() or 1))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def make_kind(work: Path, kind: Kind, plan: dict[str, int]) -> None:
    """From a new transformer to a complete model."""
    make_shards(work, kind)
    train(work, kind, plan)
    part(work / "models" / kind, lambda out: finish(out, work, kind))


def make_start(out: Path, work: Path, kind: Kind) -> None:
    """A model folder whose transformer is new."""
    import diffusers
    from diffusers import CogVideoXTransformer3DModel
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(1)
    facts, shared = small_facts(kind), work / "shared"
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(shared / "vae")
    wanted = facts.vae()
    vae.register_to_config(**{name: wanted[name] for name in ("scaling_factor", "invert_scale_latents")})
    transformer = CogVideoXTransformer3DModel(**facts.transformer())
    pipeline = getattr(diffusers, facts.pipeline)(
        tokenizer=AutoTokenizer.from_pretrained(shared / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(shared / "text_encoder"),
        scheduler=diffusers.CogVideoXDDIMScheduler(**facts.scheduler()),
        transformer=transformer,
        vae=vae,
    )
    with quiet_libraries():
        pipeline.save_pretrained(out)
    shutil.rmtree(out / "tokenizer")
    shutil.copytree(shared / "tokenizer", out / "tokenizer")


def make_shards(work: Path, kind: Kind) -> None:
    """Encode in several processes: such small clips leave a GPU waiting for one."""
    size = ["--frames", FRAMES, "--size", f"{HEIGHT}x{WIDTH}", "--fps", 8]
    draws = ["--image-draws", 4] if small_facts(kind).image_to_video else []
    words = ["encode", "--data-root", work / "clips" / "train", "--model", work / "start" / kind, *size, *draws,
             "--shards", work / "shards" / kind, "--shard-size", 8,
             "--vae-dtype", "float32", "--text-dtype", "float32"]  # fmt: skip
    with ThreadPoolExecutor(ENCODERS) as pool:
        list(pool.map(lambda _: command(*words), range(ENCODERS)))


def train(work: Path, kind: Kind, plan: dict[str, int]) -> None:
    out = work / "runs" / kind
    if (out / "transformer").exists():
        return
    command("train", "--training-type", "full", "--shards", work / "shards" / kind, "--model", work / "start" / kind,
            "--output", out, "--resume", "latest", "--steps", plan[kind], "--batch-size", plan["batch"],
            "--lr", "1e-3", "--lr-scheduler", "cosine",
            "--warmup-steps", max(1, plan[kind] // 50), "--caption-dropout", "0.1", "--checkpoint-every", "1000",
            "--keep-checkpoints", "1", "--log-every", max(1, plan[kind] // 100),
            "--no-gradient-checkpointing", *COMPILE, "--workers", min(8, os.cpu_count() or 1),
            "--dtype", "bfloat16" if DEVICE.type == "cuda" else "float32")  # fmt: skip


def finish(out: Path, work: Path, kind: Kind) -> None:
    """The start's folder with the trained transformer, all weights in bfloat16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(work / "start" / kind, out, dirs_exist_ok=True)
    shutil.copytree(work / "runs" / kind / "transformer", out / "transformer", dirs_exist_ok=True)
    for file in out.rglob("*.safetensors"):
        save_file(
            {name: value.to(torch.bfloat16).contiguous() for name, value in load_file(file).items()},
            file,
            {"format": "pt"},
        )


def command(*words: object) -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cogcache", *map(str, words)], check=True)
    print(f"{words[0]} took {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
