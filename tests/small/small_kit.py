"""A small model of random weights, laid out as the recipe leaves its work; for tests of what is done with it."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from cogcache.quiet import quiet_libraries
from cogcache.small import KINDS, all_scenes
from cogcache.small.architecture import small_facts
from cogcache.tiny.tokenizer import write_tokenizer

ROOT = Path(__file__).parent.parent.parent


def recipe(name: str) -> SimpleNamespace:
    """A script of ``scripts/small_model``, imported."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "small_model" / f"{name}.py")))


@contextmanager
def recipe_modules(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules of the recipe by name, in an order in which they can be imported; they see each other as scripts do."""
    sys.path.insert(0, str(ROOT / "scripts" / "small_model"))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)
        for name in names:
            sys.modules.pop(name, None)


def random_work(work: Path) -> Path:
    """What ``make.py`` leaves of its models, with random weights."""
    import diffusers
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    captions = sorted(scene.caption for scene in all_scenes())[::7]
    (work / "shared").mkdir(parents=True)
    (work / "shared" / "reached.json").write_text(json.dumps({"psnr": 5.0}))
    write_tokenizer(work / "tokenizer", 226, captions)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5EncoderModel(T5Config(**small_facts("t2v").text_encoder(len(tokenizer))))
        vae = diffusers.AutoencoderKLCogVideoX(**small_facts("t2v").vae())
        for kind in KINDS:
            facts = small_facts(kind)
            wanted = facts.vae()
            vae.register_to_config(**{n: wanted[n] for n in ("scaling_factor", "invert_scale_latents")})
            pipeline = getattr(diffusers, facts.pipeline)(
                tokenizer=tokenizer,
                text_encoder=text,
                scheduler=diffusers.CogVideoXDDIMScheduler(**facts.scheduler()),
                transformer=diffusers.CogVideoXTransformer3DModel(**facts.transformer()),
                vae=vae,
            )
            with quiet_libraries():
                pipeline.save_pretrained(work / "models" / kind)
    for file in work.rglob("*.safetensors"):  # the configs go on saying float32, as the recipe's do
        save_file({name: value.to(torch.bfloat16) for name, value in load_file(file).items()}, file)
    return work
