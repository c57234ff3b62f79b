"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cogcache.inspect.table import size_text
from cogcache.planner.target import Target
from cogcache.train.memory.forecast import Forecast
from cogcache.train.memory.table import aligned, tier_table
from cogcache.wording import counted

__all__ = ["as_text", "duration_text"]


def as_text(plan: Mapping[str, Any], plans: Sequence[tuple[Target, Sequence[Forecast]]]) -> str:
    """The whole plan: with one target its tiers, with several a line for each."""
    target, forecasts = plans[0]
    if len(plans) == 1:
        body = [
            f"{target.name}: {_memory(plan['targets'][0])}",
            tier_table(forecasts, target.free),
            _verdict(plan["targets"][0]),
            _disk(plan["disk"]),
            _times(plan),
        ]
    else:
        body = [tier_table(forecasts, times=False), _cards(plan["targets"]), _disk(plan["disk"])]
    return "\n\n".join([_head(plan), _flops(plan["targets"][0]["tiers"]), *body, _notes(plan)])


def _head(plan: Mapping[str, Any]) -> str:
    model, settings, clips = plan["model"], plan["settings"], plan["clips"]
    what = (
        "all weights trained"
        if settings["training_type"] == "full"
        else (f"LoRA of rank {settings['rank']}, {model['trained'] / 1e6:.1f} million weights")
    )
    lines = [
        f"{model['name']}: {model['parameters'] / 1e9:.2f} billion weights in {model['dtype']}, {what}",
        f"batch size {settings['batch_size']}, gradient accumulation {settings['grad_accum']}, all on each GPU",
    ]
    for one in clips["buckets"]:
        count = "" if one["clips"] is None else f"{counted(one['clips'], 'clip')}, "
        tokens = one["video_tokens"] + one["text_tokens"]
        lines.append(
            f"{one['bucket']}: {count}{tokens:,} tokens "
            f"({one['video_tokens']:,} of video, {one['text_tokens']} of text)"
        )
    if not clips["encoded_for_this_model"]:
        lines.append("These shards were encoded for another kind of model: train would refuse them.")
    if len(clips["buckets"]) > 1:
        lines.append(
            f"Memory is that of {clips['memory_is_that_of']}; operations and times are the mean over all clips."
        )
    return "\n".join(lines)


def _flops(tiers: Sequence[Mapping[str, Any]]) -> str:
    rows = [["TFLOP a step", "linear", "attention", "together"]]
    first = tiers[0]["flops"]
    rows += [_flops_row(name, first[name]) for name in ("forward", "backward")]
    groups: dict[tuple[int, int], list[str]] = {}
    for tier in tiers:
        again = tier["flops"]["recomputed"]
        groups.setdefault((again["linear"], again["attention"]), []).append(tier["tier"])
    groups.pop((0, 0), None)
    for (linear, attention), names in groups.items():
        rows.append(
            _flops_row(f"recomputed by {', '.join(names)}", {"linear": linear, "attention": attention})
        )
    return aligned(rows)


def _flops_row(name: str, flops: Mapping[str, int]) -> list[str]:
    numbers = [flops["linear"], flops["attention"], flops["linear"] + flops["attention"]]
    return [f"  {name}", *(_rounded(number / 1e12) if number else "-" for number in numbers)]


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def _memory(target: Mapping[str, Any]) -> str:
    host = target["host_free"]
    known = (
        f"{_gib(host)} of host memory"
        if host is not None
        else "host memory unknown (--host-memory limits it)"
    )
    rates = target["rates"]
    pace = ""
    if rates:
        pace = (
            f"\nin a step {rates['linear'] / 1e12:.0f} TFLOP/s in matrix products, {rates['attention'] / 1e12:.0f} in "
            f"attention, {rates['link'] / 1e9:.0f} GB/s from the host ({rates['source']})"
        )
    return f"{_gib(target['gpu_free'])} of GPU memory for training, {known}{pace}"


def _verdict(target: Mapping[str, Any]) -> str:
    """Which tier is taken, and what keeps the faster ones out."""
    lines = []
    for tier in target["tiers"]:
        if tier["tier"] == target["auto"]:
            break  # those behind it are slower
        alone = len(target["tiers"]) == 1  # else ``auto`` never takes plain: it needs more than balanced
        if tier["missing"] and (alone or tier["tier"] != "plain"):
            lines.append(f"  {tier['tier']} does not fit: it needs {tier['missing']}.")
    head = f"--memory auto takes {target['auto']}."
    if not target["auto"]:
        head = "Nothing fits."
    return "\n".join([head, *lines])


def _cards(targets: Sequence[Mapping[str, Any]]) -> str:
    rows = [["typical cards", "auto takes", "GPU GiB", "host GiB", "s a step", "the run", "encoding"]]
    for target in targets:
        taken = next((tier for tier in target["tiers"] if tier["tier"] == target["auto"]), None)
        if taken is None:
            rows.append([f"  {target['name']}", "none fits", *["-"] * 5])
            continue
        host = max(taken["host"]["together"], taken["host"]["while_loading"])
        rows.append(
            [
                f"  {target['name']}",
                taken["tier"],
                f"{taken['gpu']['together'] / 2**30:.1f}",
                f"{host / 2**30:.1f}",
                "-" if taken["seconds"] is None else f"{taken['seconds']:.2f}",
                duration_text(target["run_s"]),
                duration_text(target["encode_s"])
                + " (tiled)" * bool(target["encode_s"] and target["encode_tiled"]),
            ]
        )
    return aligned(rows)


def _disk(disk: Mapping[str, Any]) -> str:
    if disk["stored"] is not None:
        series = ", ".join(f"{name} {size_text(size)}" for name, size in sorted(disk["stored"].items()))
        together = size_text(sum(disk["stored"].values()))
        return f"Disk: the cache holds {counted(disk['of'], 'clip')} in {together} ({series})."
    parts = {"latents": disk["latents"], "captions": disk["text"], "first frames": disk["images"]}
    series = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return (
        f"Disk for {counted(disk['of'], 'clip')}: {size_text(disk['together'])} ({series}); "
        f"{size_text(disk['eight_bit'])} with --log-variance 8bit, about {size_text(disk['zarr'])} with --format zarr."
    )


def _times(plan: Mapping[str, Any]) -> str:
    target, clips = plan["targets"][0], plan["clips"]
    lines = []
    if target["encode_s"]:
        many = counted(clips["total"], "clip") if clips["total"] else "one clip of each bucket"
        how = " in tiles, since whole pictures do not fit," if target["encode_tiled"] else ""
        lines.append(
            f"Encoding {many}{how} keeps the GPU busy for {duration_text(target['encode_s'])}; reading the videos may "
            "take longer."
        )
    if target["run_s"] is not None:
        epochs = f", {clips['epochs']:.1f} epochs" if clips["epochs"] is not None else ""
        steps = counted(plan["settings"]["steps"], "step")
        lines.append(
            f"Training {steps}{epochs}: {duration_text(target['run_s'])}, validation and checkpoints not counted."
        )
    return "\n".join(lines)


def duration_text(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3.4 h``, ``2.1 days``."""
    if seconds is None:
        return "-"
    for size, unit in ((60, "s"), (3600, "min"), (86400, "h")):
        if seconds < 2 * size:
            amount = seconds * {"s": 1, "min": 1 / 60, "h": 1 / 3600}[unit]
            return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _notes(plan: Mapping[str, Any]) -> str:
    notes = [
        "Memory is what tensors take at the peak; CUDA's own half a GB comes on top. With several GPUs each needs "
        "this, and the host its part for each."
    ]
    if any(target["rates"] for target in plan["targets"]):
        measured = all(target["times_are"] == "measured rates" for target in plan["targets"])
        notes.append(
            "Times follow from rates measured on this GPU just now."
            if measured
            else "Times were fitted on an H200; for other GPUs they are estimates from datasheets."
        )
    return "\n".join(notes)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
