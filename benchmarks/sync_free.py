"""Does a training step on a GPU ever wait? Trains a small random model with torch's synchronisation check on.

    python benchmarks/sync_free.py

Every optimizer step but the first of each run is made under ``torch.cuda.set_sync_debug_mode("error")``, in which any
operation that waits for the device raises. Then what the profiler sees of two steps: copies to the device and their
kind. Then one run over a clip that is not a number: whether weights and optimizer state stay as they were, also
in the step that was launched before anybody knew. Last, how far torch's fused AdamW is from the plain one. Prints a
line for each, exits with 1 if something waited or was updated. Takes about a minute and 2 GB of disk.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cogcache.bench.random_cache import random_cache
from cogcache.config import TrainConfig
from cogcache.errors import NonFiniteError
from cogcache.tiny import Family, build_tiny_model
from cogcache.train import train
from cogcache.train.loop import Trainer
from cogcache.variants import read_variant

STEPS, CLIPS = 6, 6
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"memory": "plain"},
    "fast": {"memory": "fast", "compile": False},
    "balanced": {"memory": "balanced", "compile": False},
    "small": {"memory": "small", "compile": False},
    "tiny": {"memory": "tiny", "compile": False},
    "two microbatches": {"memory": "small", "compile": False, "grad_accum": 2},
    "float16": {"memory": "plain", "model": "2b"},
    "all weights": {"memory": "plain", "training_type": "full", "lr": 1e-5},
    "checkpoints": {"memory": "small", "compile": False, "checkpoint_every": 2},
    "small, compiled": {"memory": "small"},
}
failed: list[str] = []


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` becomes ``make(owner.name)``."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def checked(go_on: Callable[..., None]) -> Callable[..., None]:
    """One turn of the training loop under the check, after the first, in which constants are made."""

    def turn(self: Trainer, plan: Any, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if plan.number > 1 else "default")
        try:
            go_on(self, plan, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return turn


def settings(work: Path, family: Family, name: str, **more: Any) -> TrainConfig:
    values = {"steps": STEPS, "checkpoint_every": 0, "output": work / f"run {name}"}
    return TrainConfig(**{**values, "shards": work / f"shards-{family}", **more})


def prepare(work: Path) -> None:
    for family in ("5b", "2b"):
        dtype = "float16" if family == "2b" else "bfloat16"
        model = build_tiny_model(work / family, family, dtype=dtype)
        root = random_cache(work / f"shards-{family}", "5b", CLIPS, read_variant(model))
        assert root.is_dir()


def never_waits(work: Path, name: str, options: dict[str, Any]) -> None:
    family = options.get("model", "5b")
    config = settings(work, family, name, **{**options, "model": str(work / family)})
    started = time.perf_counter()
    try:
        with replaced(Trainer, "_go_on", checked):
            train(config)
        print(
            f"{name}: {STEPS - 1} steps without waiting ({time.perf_counter() - started:.1f} s)", flush=True
        )
    except RuntimeError as error:
        failed.append(name)
        where = [
            line for line in traceback.format_exc().splitlines() if "cogcache" in line or "torch" in line
        ]
        print(f"{name}: WAITED: {error}", *where[-12:], sep="\n    ", flush=True)


def copies(work: Path) -> None:
    """What two steps copy, by kind, as the profiler sees it."""
    found: Counter[str] = Counter()

    def profiled(go_on: Callable[..., None]) -> Callable[..., None]:
        def turn(self: Trainer, plan: Any, *rest: Any) -> None:
            if plan.number not in (3, 4):
                return go_on(self, plan, *rest)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                go_on(self, plan, *rest)
                torch.cuda.synchronize()
            found.update(event.name for event in profile.events() if event.name.startswith("Mem"))
            return None

        return turn

    with replaced(Trainer, "_go_on", profiled):
        train(settings(work, "5b", "copies", model=str(work / "5b"), memory="fast", compile=False))
    print("copies in two steps of tier fast:", dict(found), flush=True)
    if any("Pageable" in name for name in found):
        failed.append("pageable copies")


def halts(work: Path) -> None:
    """A clip that is not a number: nothing is updated by its step or the one launched behind it."""
    kept: list[tuple[int, list[torch.Tensor]]] = []

    def launched(launch: Callable[..., Any]) -> Callable[..., Any]:
        def turn(self: Trainer, plan: Any, *rest: Any) -> Any:
            step = launch(self, plan, *rest)
            state = self.engine.state() if hasattr(self.engine, "state") else {}
            weights = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
            kept.append((plan.number, [t.detach().clone() for t in (*weights.values(), *state.values())]))
            return step

        return turn

    def poisoned(forward: Callable[..., Any]) -> Callable[..., Any]:
        def turn(self: Trainer, batch: Any, step: int, micro: int) -> Any:
            loss = forward(self, batch, step, micro)
            return loss * float("nan") if step == 3 else loss

        return turn

    for name, options in {"plain": {}, "tiny": {"compile": False}}.items():
        kept.clear()
        try:
            with replaced(Trainer, "_launch", launched), replaced(Trainer, "_forward", poisoned):
                train(settings(work, "5b", f"halts {name}", model=str(work / "5b"), memory=name, **options))
            told = "nothing was raised"
        except NonFiniteError as error:
            told = error.message
        before, *after = [state for number, state in kept if number >= 2]
        same = [all(map(torch.equal, before, state)) for state in after]
        moved = not all(map(torch.equal, kept[0][1], kept[1][1]))
        print(f"not a number, {name}: {told!r}; steps after it that changed nothing: {same}", flush=True)
        if "step 3" not in told or not all(same) or not moved:
            failed.append(f"halts {name}")


def fused() -> None:
    """Ten updates by both kernels from the same start."""
    ends = []
    for kernel in ({"fused": True}, {"foreach": True}):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(1 << 20, device="cuda"))
        optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=1e-2, **kernel)
        for _ in range(10):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        ends.append(weight.detach())
    apart = (ends[0] - ends[1]).abs()
    print(f"fused and plain AdamW after 10 updates: {float((apart > 0).float().mean()):.1%} of the weights differ, "
          f"by at most {float(apart.max()):.1e}, {float((apart / ends[1].abs()).max()):.1e} of themselves")  # fmt: skip


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU.")
        return 1
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for name, options in RUNS.items():
            never_waits(work, name, options)
        copies(work)
        halts(work)
    fused()
    print(
        "FAILED: " + ", ".join(failed) if failed else "Nothing waited, nothing was updated that must not be."
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
