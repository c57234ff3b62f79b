"""The commands under ``cogcache bench``. Imports nothing heavy, so that ``--help`` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure on this machine, side by side with what others do.", no_args_is_help=True
)


@bench_app.callback()
def _bench() -> None:
    """Keeps 'load' a command of its own while it is the only one."""


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
            metavar="URL", help="Also read the same cache from there (s3://...); put it there first."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Each figure is the fastest of so many.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of the waiting test, 10 a second.", min=2)] = 200,
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
