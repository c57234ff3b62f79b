"""The command line: the only place that knows all stages.

Exit codes: 0 done; 2 bad input, nothing lost; 3 done, but some clips failed; 4 the loss became non-finite; 5 the
cache is damaged; 6 nothing fits the memory; 130 or 143 stopped by Ctrl-C or SIGTERM, go on with the same command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.main
from typer.core import TyperGroup

from cogcache.bench.commands import bench_app
from cogcache.cache_commands import export_command, inspect_command, merge_command, verify_command
from cogcache.errors import CogcacheError
from cogcache.planner.commands import plan_command
from cogcache.stopping import STOPPED, telling_of_sigterm

if TYPE_CHECKING:
    import logging

    from pydantic import BaseModel

__all__ = ["app", "main"]

_CTRL_C = 130
Family = Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
SmallKind = Literal["t2v", "i2v", "t2v-1.5"]


def _config_commands() -> dict[str, tuple[type[BaseModel], Callable[[Any], None]]]:
    """The commands whose flags are the fields of a config. Imported late, so that ``--help`` stays instant."""
    from cogcache.config import EncodeConfig, ExtractImagesConfig, InferConfig, TrainConfig

    def encode(config: EncodeConfig) -> None:
        from cogcache.precompute import encode

        encode(config)

    def train(config: TrainConfig) -> None:
        import time

        import psutil

        from cogcache.allocator_settings import set_up_allocators

        set_up_allocators()  # torch comes with the next import
        from cogcache.train import train

        train(config, begun=time.time() - psutil.Process().create_time())

    def infer(config: InferConfig) -> None:
        from cogcache.infer import infer

        infer(config)

    def extract(config: ExtractImagesConfig) -> None:
        from cogcache.precompute.extract import extract_images

        extract_images(config)

    return {
        "encode": (EncodeConfig, encode),
        "train": (TrainConfig, train),
        "infer": (InferConfig, infer),
        "extract-images": (ExtractImagesConfig, extract),
    }


_HELP = {
    "encode": """Encode clips and captions once, into shards.

        Runs the frozen VAE over the clips and T5 over the captions. Stop it at any moment: run
        the same command again and only what is missing is done. Clips that cannot be read are listed with their
        reasons at the end (exit code 3) and are tried again by the next run.

        Example:  cogcache encode --data-root ./clips --model THUDM/CogVideoX-5b --frames 49 --size 480x720
        """,
    "train": """Train a LoRA (or all weights) on shards. Loads the transformer only: no VAE, no T5, no video.

        Example:  cogcache train --shards shards/clips --rank 128 --alpha 64 --steps 500

        Go on after a stop:  the same command with --resume latest
        """,
    "infer": """Generate video with the stock diffusers pipeline and a trained LoRA.

        Example:  cogcache infer --lora runs/clips/pytorch_lora_weights.safetensors --prompt "A rabbit stretches"
        """,
    "extract-images": """Write the first frame of every listed video as a PNG, and images.txt beside videos.txt.

        Encoding for image-to-video does not need this: it takes each clip's first frame by itself. Use it to
        look at first frames or to edit them. A video that cannot be read is listed with its reason (exit code
        3), and images.txt is written once every video has its image.

        Example:  cogcache extract-images --data-root ./clips
        """,
}


class _LateFlags(TyperGroup):
    """Builds the flags of a command when it is called: listing the commands needs no config."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _with_flags(name) if name in _HELP else command, rest


def _with_flags(name: str) -> Any:
    from cogcache.flags import config_command

    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name)(config_command(*_config_commands()[name], _HELP[name]))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="cogcache",
    cls=_LateFlags,
    help="LoRA fine-tuning of CogVideoX with an offline cache: encode once, train lean, infer stock.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from cogcache import __version__

        typer.echo(f"cogcache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _ = version


def _later() -> None:
    raise AssertionError("replaced when it is called")


for _name, _text in _HELP.items():
    app.command(_name, help=_text)(_later)


@app.command("tiny-model")
def _tiny_model(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not hold anything yet.")],
    family: Annotated[Family, typer.Option(help="Whose facts it has.")] = "5b",
    seed: Annotated[int, typer.Option(help="Decides the random weights.", min=0)] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the stored weights.")
    ] = "float32",
) -> None:
    """Write a complete tiny CogVideoX with random weights, a few MB, for trying things out."""
    from cogcache.tiny import build_tiny_model

    build_tiny_model(out, family, seed=seed, dtype=dtype)
    typer.echo(f"Wrote a tiny {family} model with random weights to {out}")


@app.command("small-model")
def _small_model(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not hold anything yet.")],
    kind: Annotated[
        SmallKind,
        typer.Option(
            help="t2v: text-to-video as CogVideoX-5B. i2v: image-to-video as 5B-I2V. t2v-1.5: text-to-video as 1.5-5B."
        ),
    ] = "t2v",
) -> None:
    """Write a complete small CogVideoX with trained weights, in diffusers layout, to see results without a GPU.

    It was trained from nothing on 17 frames of 96x144 at 8 a second: single shapes that move, and cuts of open films.
    Everything takes it as --model. Weights are in bfloat16, in which a processor is ten times as slow as in float32:

    Example:  cogcache small-model models/small
              cogcache encode --data-root ./clips --model models/small --frames 17 --size 96x144 --fps 8
                --vae-dtype float32 --text-dtype float32
              cogcache train --shards shards/clips --dtype float32 --rank 64 --alpha 64 --lr 4e-3 --batch-size 4
                --target-modules attention+ff --steps 130
              cogcache infer --model models/small --dtype float32 --steps 25
                --prompt "A large red circle moves up on a grey background."
    """
    from cogcache.small import small_model

    small_model(kind, out)
    typer.echo(
        f"Wrote the small {kind} model with trained weights to {out}; its README.md says what it can do."
    )


@app.command("convert-lora")
def _convert_lora(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="LoRA file or PEFT adapter folder, of this or another trainer."),
    ],
    out: Annotated[Path, typer.Argument(help="File (.safetensors), or folder for peft; must not be there.")],
    form: Annotated[
        Literal["diffusers", "folded", "peft"],
        typer.Option(
            "--format",
            help="diffusers: one file with alpha in its metadata. folded: alpha multiplied into the weights, for tools "
            "that take alpha = rank. peft: adapter_model.safetensors and adapter_config.json.",
        ),
    ] = "folded",
    lora_alpha: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Alpha it was trained with, if it does not say. Default: its rank."),
    ] = None,
) -> None:
    """Write a LoRA in the format another tool takes.

    Example:  cogcache convert-lora runs/clips/pytorch_lora_weights.safetensors for-comfyui.safetensors
    """
    from cogcache.lora.convert import convert_lora

    typer.echo(f"Wrote {convert_lora(source, out, form, lora_alpha)} ({form})")


app.command("verify")(verify_command)
app.command("inspect")(inspect_command)
app.command("export")(export_command)
app.command("merge")(merge_command)
app.add_typer(bench_app, name="bench")
app.command("plan")(plan_command)


@app.command("demo")
def _demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("runs/demo"),
    family: Annotated[
        Family | None,
        typer.Option(
            help="Which family's facts the model has. 5b, 5b-i2v and 1.5-5b have a small one with trained weights; the "
            "others a tiny one with random weights, which generates noise. Default: 5b, or what of it does the task."
        ),
    ] = None,
    task: Annotated[
        Literal["t2v", "i2v"] | None,
        typer.Option(help="Text-to-video or image-to-video. Default: that of the family."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps. Default: 130 for a small model, 60 for a tiny one.", min=1),
    ] = None,
) -> None:
    """Take eight real clips through encode, train and infer on a model that comes along; show what came out.

    Ends in demo.html and demo.png: what the base model and the LoRA generate for the same captions and seeds, beside
    the real clips, what the VAE makes of them, and the loss curve. Under three minutes on two processor cores.
    """
    from cogcache.demo import run_demo

    run_demo(output, family, steps, task)


def _needed(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of a missing accelerator whenever it is imported, even where nobody asked for one."""
    return "Setting accelerator to CPU" not in record.getMessage()


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    with telling_of_sigterm():
        code = run(args)
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Run the command line; turn every error of the project into one clear message and an exit code."""
    import logging

    logging.getLogger("DeepSpeed").addFilter(_needed)
    try:
        result = app(args=args, standalone_mode=False)
    except CogcacheError as error:
        _report(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = _CTRL_C
    except Exception as error:
        return _outside(error)
    if result == _CTRL_C:  # typer turns Ctrl-C inside a command into this result
        typer.secho(STOPPED, err=True)
    return result if isinstance(result, int) else 0


def _report(error: CogcacheError) -> None:
    if os.environ.get("COGCACHE_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    label = (
        {3: "Incomplete: ", 5: "Damaged: "}.get(error.exit_code, "Error: ") if error.exit_code < 128 else ""
    )
    typer.secho(f"{label}{error.message}", err=True, fg="red")
    if error.hint:
        typer.secho(error.hint, err=True)


def _outside(error: Exception) -> int:
    """Errors of the argument parser are shown its way; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return int(getattr(error, "exit_code", 2))
