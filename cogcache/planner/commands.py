"""The command ``cogcache plan``. Imports nothing heavy, so that ``--help`` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["plan_command"]

_WHAT, _HOW, _WHERE = "What is trained", "How it is trained", "On what"


def plan_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: a local folder or a hub id, of which only the config files are read.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    family: Annotated[
        Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"] | None,
        typer.Option(
            help="A published CogVideoX by its short name, instead of --model: needs no files at all.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Plan for the clips and the model of this cache, a folder or a URL.", rich_help_panel=_WHAT
        ),
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FxHxW",
            help="Shape of clips: frames x height x width, as often as there are shapes.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames a clip, 8N+1. Default: the model's own, 49 or 81.", rich_help_panel=_WHAT),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Picture size in pixels. Default: the model's own, 480x720 or 768x1360.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(
            help="How many clips there will be: for disk, encoding and epochs.", min=1, rich_help_panel=_WHAT
        ),
    ] = None,
    image_draws: Annotated[
        int,
        typer.Option(
            help="Image-to-video only: first frames that encode keeps.", min=1, rich_help_panel=_WHAT
        ),
    ] = 8,
    rank: Annotated[
        int | None, typer.Option(help="LoRA rank; 128 if not given.", min=1, rich_help_panel=_HOW)
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that get a LoRA, as for train: attention (the default), attention+ff, names.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    training_type: Annotated[
        Literal["lora", "full"] | None,
        typer.Option(help="A LoRA, or every weight. Default: lora.", rich_help_panel=_HOW),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Clips at once on each GPU. Default: 1.", min=1, rich_help_panel=_HOW)
    ] = None,
    grad_accum: Annotated[
        int | None, typer.Option(help="Batches a step. Default: 1.", min=1, rich_help_panel=_HOW)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of the run. Default: 500.", min=1, rich_help_panel=_HOW),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Precision the base computes in. Default: that of its weights.", rich_help_panel=_HOW
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings of 'cogcache train'; flags win.", rich_help_panel=_HOW),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Plan for this card, as 'RTX 4090'. Default: the GPU here; without one, typical cards.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Its memory in GB.", min=0.1, rich_help_panel=_WHERE)
    ] = None,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(
            help="Its speed, for times: dense bfloat16 TFLOP/s of its datasheet (165 for an RTX 4090).",
            min=0.1,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            help="GB/s between host and GPU: about 25 for PCIe 4 x16, half of it for x8.",
            min=0.1,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(
            help="The host's memory in GB: the small tiers keep weights there. Default: what is free here, if the GPU "
            "is here; else it is not limited.",
            min=0.1,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write the plan as JSON; - prints JSON alone."),
    ] = None,
) -> None:
    """Tell what training takes before anything is loaded: GPU and host memory, time, disk, and the tier to use.

    Counts tokens, operations and bytes from config files and shapes; no weights are read.

    Memory is within 10% of all that was measured; times on other GPUs than an H200 are estimates.

    Example:  cogcache plan --family 5b --gpu-memory 12 --host-memory 32 --clips 1000

    Example:  cogcache plan --shards shards/clips --rank 64 --batch-size 2
    """
    from cogcache.planner.run import PlanRequest, plan

    training: dict[str, Any] = {
        "rank": rank,
        "target_modules": target_modules,
        "training_type": training_type,
        "batch_size": batch_size,
        "grad_accum": grad_accum,
        "steps": steps,
        "dtype": dtype,
    }
    plan(
        PlanRequest(
            model=model,
            family=family,
            shards=shards,
            bucket=bucket or [],
            frames=frames,
            size=size,
            clips=clips,
            image_draws=image_draws,
            gpu=gpu,
            gpu_memory=gpu_memory,
            gpu_tflops=gpu_tflops,
            link=link,
            host_memory=host_memory,
            config=config,
            training={name: value for name, value in training.items() if value is not None},
        ),
        json_out,
    )
