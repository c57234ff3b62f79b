"""The commands under ``cogcache bench``. Imports nothing heavy, so that ``--help`` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure on this machine, side by side with what others do.", no_args_is_help=True
)

GpuMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Take no more than so much of the GPU, to see what a smaller one would do: 11 for a card of 12, of which "
        "CUDA and a screen take some.",
        min=0.5,
    ),
]


@bench_app.command("load")
def _load(
    family: Annotated[
        Literal["5b", "1.5-5b"],
        typer.Option(help="Size of the samples: 49x480x720 (5b) or 81x768x1360 (1.5-5b)."),
    ] = "5b",
    clips: Annotated[int, typer.Option(help="Clips in the cache; 6.3 or 24 MB each.", min=1)] = 128,
    workers: Annotated[str, typer.Option(help="Numbers of reading threads, joined by commas.")] = "1,2,4,8",
    work: Annotated[
        Path, typer.Option(help="Folder for the caches and files that are read; kept for the next run.")
    ] = Path("bench"),
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also read the same cache from there (s3://...), with and without a local copy.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Each figure is the fastest of so many.", min=1)] = 3,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps of the waiting test, 10 a second; one test for each cache and number of threads.",
            min=2,
        ),
    ] = 200,
    cold: Annotated[bool, typer.Option(help="Measure reads from the disk, too.")] = True,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures with the machine's facts."),
    ] = None,
) -> None:
    """How fast samples come out of a cache, beside raw reads of the same bytes and one file per sample.

    Example:  cogcache bench load --clips 256 --work /data/bench --json load.json
    """
    from cogcache.bench.run import bench_load

    bench_load(
        family=family,
        clips=clips,
        workers=workers,
        work=work,
        url=url,
        repeats=repeats,
        steps=steps,
        cold=cold,
        json_out=json_out,
    )


@bench_app.command("train")
def _train(
    family: Annotated[
        Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"], typer.Option(help="Whose size to measure.")
    ] = "5b",
    bucket: Annotated[
        str | None, typer.Option(metavar="FxHxW", help="Clip shape. Default: the family's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Clips a step.", min=1)] = 1,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 128,
    recipes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Rows, joined by commas. By default: reference (float32 base under bfloat16 autocast, fully "
            "checkpointed), plain (the same with a bfloat16 base), fast, balanced, small, tiny. Besides, "
            "plain-compiled, and diffusers' group offloading with streams: group-offload and group-offload-block (the "
            "reference's, by leaves and by blocks) and plain-group-offload. A row that fails is reported and ends "
            "nothing.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps timed, after two that are not.", min=1)] = 4,
    gpu_memory: GpuMemory = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures with the machine's facts."),
    ] = None,
) -> None:
    """Time and peak memory of a training step in each memory tier, beside the reference recipe. Needs a GPU.

    The model has its real size and random weights; nothing is downloaded. --gpu-memory holds from the first step on,
    since the model is made whole before.

    Example:  cogcache bench train --family 5b --recipes reference,small
    """
    from cogcache.bench.run import bench_train

    bench_train(
        family=family,
        bucket=bucket,
        batch_size=batch_size,
        rank=rank,
        recipes=recipes,
        steps=steps,
        gpu_memory=gpu_memory,
        json_out=json_out,
    )


@bench_app.command("encode")
def _encode(
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder with videos and captions. Default: 1080p H.264 videos are made and kept in --work."
        ),
    ] = None,
    clips: Annotated[int, typer.Option(help="Videos made; without --data-root.", min=1)] = 48,
    bucket: Annotated[str, typer.Option(metavar="FxHxW", help="Clip shape.")] = "49x480x720",
    fps: Annotated[float, typer.Option(help="Frames a second of the clips.", min=1)] = 8.0,
    parts: Annotated[
        str,
        typer.Option(help="What is measured, joined by commas: reference, untiled, tiled, text, accuracy."),
    ] = "reference,untiled,tiled,text,accuracy",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode video. Default: as encode.", min=1)
    ] = None,
    captions: Annotated[int, typer.Option(help="Captions embedded.", min=1)] = 256,
    text_batch_size: Annotated[int, typer.Option(help="Captions embedded at once.", min=1)] = 32,
    gpu_memory: GpuMemory = None,
    work: Annotated[
        Path, typer.Option(help="Folder for videos, which are kept, and for caches, which are not.")
    ] = Path("bench"),
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures with the machine's facts."),
    ] = None,
) -> None:
    """Clips and captions encoded per second, memory and accuracy, beside the reference recipe.

    VAE and T5 have their real size and random weights; nothing is downloaded. The reference decodes, encodes in
    tiles and writes one clip after the other, and embeds one caption at a time.

    Example:  cogcache bench encode --parts reference,untiled --clips 48
    """
    from cogcache.bench.run_encode import bench_encode

    bench_encode(
        data_root=data_root,
        clips=clips,
        bucket=bucket,
        fps=fps,
        parts=parts,
        device=device,
        workers=workers,
        captions=captions,
        text_batch_size=text_batch_size,
        gpu_memory=gpu_memory,
        work=work,
        json_out=json_out,
    )
