"""The command: plan, load once, generate each prompt, write each file as soon as it is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcache.config import InferConfig
from cogcache.config_io import save_config
from cogcache.errors import ConfigError, NonFiniteError, StorageError
from cogcache.infer.conditions import check_conditions, pipeline_inputs
from cogcache.infer.plan import Plan, plan_inference
from cogcache.progress import Progress, say

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["infer"]


def infer(config: InferConfig) -> list[Path]:
    """Generate one H.264 mp4 for each prompt and return the files in order.

    Beside them lies ``<stem of --output>.config.yaml`` with the effective settings.

    Raises:
        CogcacheError: for anything wrong with the input, before weights are loaded where possible.
    """
    plan = plan_inference(config)
    _prepare_folder(plan)
    check_conditions(plan)
    from cogcache.infer.pipeline import load_pipeline
    from cogcache.mp4 import write_mp4

    pipe = load_pipeline(plan)
    with Progress("Generating", len(plan.prompts) * plan.steps, "steps") as progress:
        for number, (prompt, output) in enumerate(zip(plan.prompts, plan.outputs, strict=True)):
            write_mp4(output, _generate(pipe, plan, prompt, number, progress), plan.fps)
    for prompt, output in zip(plan.prompts, plan.outputs, strict=True):
        say(f"{output}: {prompt[:80]}")
    return list(plan.outputs)


def _prepare_folder(plan: Plan) -> None:
    """Find out now, not after minutes of sampling, whether the output can be written."""
    output = plan.config.output
    there = [path for path in plan.outputs if path.exists()]
    if there and not plan.config.overwrite:
        raise ConfigError(f"{there[0]} is already there.", "Choose another --output, or add --overwrite.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{output.parent} cannot be written: {error.strerror or error}.") from None
    save_config(plan.config, output.with_name(f"{output.stem}.config.yaml"))


def _generate(pipe: Any, plan: Plan, prompt: str, number: int, progress: Progress) -> npt.NDArray[np.uint8]:
    """RGB frames [F, H, W, 3] of one prompt.

    The starting noise comes from a CPU generator, so that it is the same on every device. Dynamic guidance is
    off with every sampler: diffusers' formula subtracts the timestep (0..999) from the number of steps, which
    makes guidance jump about between 1 and its maximum.
    """
    import numpy as np
    import torch

    def step_done(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress.advance()
        return tensors

    config = plan.config
    video = pipe(
        **pipeline_inputs(plan, number),
        prompt=prompt,
        negative_prompt=config.negative_prompt,
        height=plan.size.height,
        width=plan.size.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        use_dynamic_cfg=False,
        generator=torch.Generator("cpu").manual_seed(config.seed + number),
        max_sequence_length=plan.variant.text_length,
        output_type="np",
        callback_on_step_end=step_done,
    ).frames[0]
    if not np.isfinite(video).all():
        raise NonFiniteError(
            f"the model produced values that are not numbers in {plan.dtype}.",
            "Try --dtype bfloat16 or float32.",
        )
    return np.asarray((video * 255).round(), dtype=np.uint8)
