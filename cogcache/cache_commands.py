"""The commands over a finished cache: ``verify``, ``inspect``, ``export`` and ``merge``. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cogcache.wording import counted

__all__ = ["export_command", "inspect_command", "merge_command", "verify_command"]

Format = Literal["webdataset", "zarr"]
Compression = Literal["zstd", "none"]
_FORMAT = "How the new shards are stored. Default: as the old ones."
_COMPRESSION = "Compression of zarr shards."


def verify_command(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Cache written by 'cogcache encode': a folder or a URL.")
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop what is damaged, so that the next encode remakes just that."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Also encode this share (1%) or number of clips again from their videos and compare, and decode "
            "what is stored. Needs the model and the videos.",
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the videos. Default: the one that encode was given.")
    ] = None,
    device: Annotated[str, typer.Option(help="For --decode: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Check every byte of a cache.

    Structure, checksums, tensors and references; every damage is listed with its file, entry and clips (exit code 5).
    With --repair what is lost but can be proven is rebuilt, and what is damaged is dropped (exit code 3 where
    encode must then run again).

    Example:  cogcache verify shards/clips
    """
    from cogcache.cache.verify import verify
    from cogcache.location import local_folder, parse_location

    again = None
    if decode is not None:
        from functools import partial

        from cogcache.precompute.redo import decode_again, parse_share

        parse_share(decode)
        again = partial(
            decode_again, root=local_folder(shards), share=decode, data_root=data_root, device=device
        )
    verify(parse_location(shards), repair=repair, as_json=as_json, decode=again)


def inspect_command(
    shards: Annotated[str, typer.Argument(help="Folder or URL of the cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a gallery of all clips: one HTML file.")
    ] = None,
    latents: Annotated[
        bool | None,
        typer.Option(
            "--latents/--no-latents",
            help="Read every latent for mean, spread, outliers and pictures. Default: with --html only.",
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the videos, for pictures. Default: the one encoded from.")
    ] = None,
) -> None:
    """Tell what a cache holds: a table, JSON, or a gallery in one HTML file. Changes nothing.

    Example:  cogcache inspect shards/clips --html clips.html
    """
    from cogcache.inspect import inspect_shards

    inspect_shards(shards, as_json=as_json, html=html, latents=latents, data_root=data_root)


def export_command(
    shards: Annotated[str, typer.Argument(help="Folder or URL of the cache.")],
    out: Annotated[str, typer.Argument(help="Folder of the new cache.")],
    query: Annotated[str, typer.Option(help="Words that caption or file name must all hold.")] = "",
    bucket: Annotated[
        str, typer.Option(metavar="FxHxW", help="Only clips of this many frames and this size.")
    ] = "",
    names: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="Only these sources or ids, one a line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many clips.")] = None,
    backend: Annotated[Format | None, typer.Option("--format", help=_FORMAT)] = None,
    zarr_compression: Annotated[Compression, typer.Option(help=_COMPRESSION)] = "zstd",
) -> None:
    """Write some of a cache's clips as a cache of its own. Nothing is encoded again.

    Example:  cogcache export shards/clips shards/rabbits --query rabbit
    """
    from cogcache.cache.transfer import export_shards
    from cogcache.location import local_folder

    manifest = export_shards(
        shards,
        local_folder(out),
        query=query,
        bucket=bucket,
        names=names,
        limit=limit,
        backend=backend,
        compression=zarr_compression,
    )
    typer.echo(f"Wrote {out}: {counted(manifest.tables['samples.jsonl'].rows, 'clip')}")


def merge_command(
    out: Annotated[str, typer.Argument(help="Folder of the new cache.")],
    shards: Annotated[list[str], typer.Argument(help="Folders or URLs of the caches to join.")],
    backend: Annotated[Format | None, typer.Option("--format", help=_FORMAT)] = None,
    zarr_compression: Annotated[Compression, typer.Option(help=_COMPRESSION)] = "zstd",
) -> None:
    """Join caches that were made with the same settings. Nothing is encoded again.

    Example:  cogcache merge shards/all shards/monday shards/tuesday
    """
    from cogcache.cache.transfer import merge_shards
    from cogcache.location import local_folder

    manifest = merge_shards(local_folder(out), shards, backend=backend, compression=zarr_compression)
    typer.echo(f"Wrote {out}: {counted(manifest.tables['samples.jsonl'].rows, 'clip')}")
