"""What torchao, bitsandbytes, DeepSpeed and diffusers' layerwise casting give in place of our own memory measures.

    python benchmarks/other_libraries.py [--rows plain,torchao-int8] [--steps 2] [--json PATH] [--quick]

CogVideoX-5B with random weights, 49x480x720, a LoRA of rank 128 on to_q, to_k, to_v and to_out, batch 1, AdamW. Rows:

- the frozen base stored in fewer bits, under diffusers' own blocks with checkpointing, compiled or not: seconds a step,
  the peak of memory, and how far prediction and gradients of the LoRA (B not zero) are from those of the bfloat16 base,
  as norm of the difference over norm. ``plain``, bfloat16 again, shows what chance does to these. The weights are
  random and uniform, without the outliers of trained ones, which integers suffer from: take the errors as the least.
- optimizers under our tier ``small``: also the time of the update alone, and how far what ten updates changed is from
  what AdamW in float32 changed.
- DeepSpeed in one process: ZeRO-2 with the optimizer on the host, ZeRO-3 with the weights there as well. As its users
  run it, with ``bf16``: the LoRA in bfloat16, a float32 copy on the host.

The peak is what torch gave out (``max_memory_allocated``). Rows that share a model share a process; a row that ends
its process is told with its error, and the others go on in a new one. Each process imports while the one before it
measures. ``--rows`` takes names of rows and of groups (``base``, ``optimizers``, ``deepspeed``). ``--quick`` takes a
tiny model, on a CPU if need be, to try the script. A row whose library is not installed fails. Needs a GPU of 40 GB
and 40 GB of host memory; about eight minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor, nn

from cogcache.bench.real import real_transformer
from cogcache.bench.recipes import RECIPES
from cogcache.bench.train import RowSettings, _forward, _prepare, _reason, _wait
from cogcache.config import TrainConfig
from cogcache.tiny import build_tiny_model
from cogcache.train.devices import _deepspeed_on_cpu, set_matmul_precision
from cogcache.train.memory.stock import compile_blocks
from cogcache.train.memory.table import aligned
from cogcache.train.model import add_lora, load_transformer, trainable
from cogcache.train.optimizer import make_optimizer
from cogcache.variants import Variant, read_variant

WARM_UP = 2
UPDATES = 10
BUILD_LIMIT = 90
"""Seconds that building DeepSpeed's AdamW may take."""
COMPILED = "-compiled"
STORED = ("plain", "torchao-int8", "torchao-float8", "bnb-nf4", "bnb-int8", "layerwise-float8")
OPTIMIZERS = (
    *("fused-adamw", "host-adamw", "torchao-adamw8bit", "torchao-adamw4bit"),
    *("bnb-adamw8bit", "bnb-paged-adamw8bit", "torchao-offload"),
)
"""The last one leaves its hooks on the parameters for good."""
ZERO = {"zero2-offload": 2, "zero3-offload": 3}
JOBS: tuple[tuple[str, ...], ...] = (
    *((name, name + COMPILED) for name in STORED),
    OPTIMIZERS,
    *((name,) for name in ZERO),
)
"""Rows that share a model, and a process."""
GROUPS = {
    "base": [row for job in JOBS[: len(STORED)] for row in job],
    "optimizers": [*OPTIMIZERS],
    "deepspeed": [*ZERO],
}

Settings = Mapping[str, Any]
MakeOptimizer = Callable[[Sequence[nn.Parameter]], Any]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    rows: tuple[str, ...]
    steps: int
    quick: bool


@dataclass(frozen=True)
class Row:
    """What a row gave; None where it measures no such thing. ``first_s`` holds the compilation."""

    row: str
    step_s: float | None = None
    peak_gib: float | None = None
    first_s: float | None = None
    update_ms: float | None = None
    prediction_error: float | None = None
    gradient_error: float | None = None
    change_error: float | None = None
    note: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Timed:
    """Steps: the first, the mean of the timed ones and of their updates, in seconds; the peak in GiB."""

    first: float
    mean: float
    update: float
    peak: float


class Bench:
    """The model, its inputs and the settings of one process."""

    def __init__(self, job: Job) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps = job.steps
        self.config = TrainConfig(shards=Path("unused"), rank=8 if job.quick else 128)
        bucket = "9x64x96" if job.quick else "49x480x720"
        self.settings = RowSettings("plain", "5b", bucket, 1, self.config.rank, job.steps)
        torch.manual_seed(0)
        self.transformer, self.variant = _tiny(self.device) if job.quick else _real(self.device)
        set_matmul_precision(self.device, torch.bfloat16)

    def prepare(self, recipe: str) -> None:
        """Add the LoRA, its B not zero, and let the blocks run as the recipe says."""
        _prepare(self.transformer, self.config, RECIPES[recipe], self.device)
        self.fill_lora()

    def fill_lora(self) -> None:
        """Draw B, which is zero at first: with it, A would have no gradient."""
        source = torch.Generator(self.device).manual_seed(1)
        for name, parameter in trainable(self.transformer).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.01, generator=source)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [*trainable(self.transformer).values()]

    def forward(self, model: Any = None) -> Callable[[], Tensor]:
        """The loss of always the same sample."""
        return _forward(model or self.transformer, self.variant, self.settings, self.device)

    def adamw(self) -> dict[str, Any]:
        """The settings of AdamW that all libraries' optimizers get."""
        config = self.config
        betas = (config.beta1, config.beta2)
        return {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _real(device: torch.device) -> tuple[Any, Variant]:
    return real_transformer("5b", torch.bfloat16, device)


def _tiny(device: torch.device) -> tuple[Any, Variant]:
    with TemporaryDirectory() as folder:
        root = build_tiny_model(Path(folder) / "model", "5b", dtype="bfloat16")
        return load_transformer(root, torch.bfloat16, device), read_variant(root)


def timed_steps(
    bench: Bench, compute: Callable[[], Tensor], update: Callable[[], None], warm_up: int = WARM_UP
) -> Timed:
    """Time steps. The device is waited for around each update, too, which costs a few milliseconds."""
    device = bench.device

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        compute()
        _wait(device)
        computed = time.perf_counter()
        update()
        _wait(device)
        ended = time.perf_counter()
        return ended - started, ended - computed

    first = [step()[0] for _ in range(warm_up)][:1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step() for _ in range(bench.steps)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    mean, updating = (sum(one) / len(times) for one in zip(*times, strict=True))
    return Timed(first[0] if first else mean, mean, updating, peak)


def timed_training(bench: Bench, optimizer: Any, warm_up: int = WARM_UP) -> Timed:
    """Time steps of the model as it is."""
    forward, parameters = bench.forward(), bench.parameters

    def compute() -> Tensor:
        loss = forward()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed_steps(bench, compute, update, warm_up)


def updating_row(row: str, timed: Timed, **more: Any) -> Row:
    """A row that also tells how long its updates took."""
    return Row(
        row,
        step_s=timed.mean,
        peak_gib=timed.peak,
        first_s=timed.first,
        update_ms=1000 * timed.update,
        **more,
    )


def relative(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Norm of the differences over the norm of what is exact, of all tensors together."""
    wrong = whole = 0.0
    for one, other in zip(found, exact, strict=True):
        wrong += float((one.double() - other.double()).square().sum())
        whole += float(other.double().square().sum())
    return float((wrong / whole) ** 0.5)


# The frozen base in fewer bits ------------------------------------------------------------------------------------


def measure_stored(job: Job) -> Iterator[Row]:
    """A way to store the base, not compiled and compiled."""
    bench = Bench(job)
    bench.prepare("plain")
    exact, _ = answer(bench)
    STORE[job.rows[0].removesuffix(COMPILED)](bench)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    optimizer = make_optimizer(bench.config, trainable(bench.transformer))
    begun = [parameter.detach().clone() for parameter in bench.parameters]
    for row in job.rows:
        for parameter, values in zip(bench.parameters, begun, strict=True):
            parameter.data.copy_(values)  # the row before has trained it
        if row.endswith(COMPILED):
            compile_blocks(bench.transformer)
        found, seconds = answer(bench)  # the first step of those to warm up
        timed = timed_training(bench, optimizer, WARM_UP - 1)
        yield Row(
            row,
            step_s=timed.mean,
            peak_gib=timed.peak,
            first_s=seconds,
            prediction_error=relative(found[:1], exact[:1]),
            gradient_error=relative(found[1:], exact[1:]),
        )


def answer(bench: Bench) -> tuple[list[Tensor], float]:
    """The prediction and then the gradients, in host memory, and the seconds that they took."""
    seen: list[Tensor] = []
    hook = bench.transformer.register_forward_hook(lambda _model, _given, out: seen.append(out[0].detach()))
    started = time.perf_counter()
    torch.autograd.backward(bench.forward()())
    _wait(bench.device)
    seconds = time.perf_counter() - started
    hook.remove()
    seen += [parameter.grad for parameter in bench.parameters if parameter.grad is not None]
    assert len(seen) == 1 + len(bench.parameters)
    for parameter in bench.parameters:
        parameter.grad = None
    return [tensor.cpu() for tensor in seen], seconds


def _as_it_is(bench: Bench) -> None:
    _ = bench


def _torchao(bench: Bench, kind: str) -> None:
    quantization: Any = import_module("torchao.quantization")
    # Its settings for inductor try each kernel many times: minutes.
    config = getattr(quantization, kind)(set_inductor_config=False)
    quantization.quantize_(bench.transformer.transformer_blocks, config, _is_base)


def _is_base(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lora_" not in name


def _replace_linears(bench: Bench, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what ``make`` gives in place of the base's linear layers of the blocks, also below PEFT's."""
    blocks = bench.transformer.transformer_blocks
    for name, module in [*blocks.named_modules()]:
        if _is_base(module, name):
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, make(module).train())


def _bnb_nf4(bench: Bench) -> None:
    bitsandbytes: Any = import_module("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        size, bias, device = (linear.in_features, linear.out_features), linear.bias, linear.weight.device
        new: nn.Module = bitsandbytes.nn.Linear4bit(
            *size, bias=bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, quant_type="nf4", module=new).to(device)
        new.bias = bias
        return new

    _replace_linears(bench, make)


def _bnb_int8(bench: Bench) -> None:
    bitsandbytes: Any = import_module("bitsandbytes")
    # It says in each call that bfloat16 becomes float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def make(linear: nn.Linear) -> nn.Module:
        size, bias = (linear.in_features, linear.out_features), linear.bias
        new: nn.Module = bitsandbytes.nn.Linear8bitLt(
            *size, bias=bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        # Not ``to``, which quantises only what comes from a CPU.
        values, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(linear.weight.data.half())
        new.weight = bitsandbytes.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
        new.bias = bias
        return new

    _replace_linears(bench, make)


def _layerwise(bench: Bench) -> None:
    """What ``enable_layerwise_casting`` leaves out stays in bfloat16: norms with their modulation, the LoRA."""
    from diffusers.hooks import HookRegistry

    transformer = bench.transformer
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    # It keeps PEFT from casting the input to the LoRA's dtype; but this LoRA is float32, and then nothing multiplies.
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook("peft_autocast_disable", recurse=True)


STORE: dict[str, Callable[[Bench], None]] = {
    "plain": _as_it_is,
    "torchao-int8": lambda bench: _torchao(bench, "Int8WeightOnlyConfig"),
    "torchao-float8": lambda bench: _torchao(bench, "Float8WeightOnlyConfig"),
    "bnb-nf4": _bnb_nf4,
    "bnb-int8": _bnb_int8,
    "layerwise-float8": _layerwise,
}


# Optimizers -------------------------------------------------------------------------------------------------------


def measure_optimizers(job: Job) -> Iterator[Row]:
    """Optimizers one after the other, on the same model under ``small``."""
    bench = Bench(job)
    recipe = RECIPES["small"]
    assert recipe.measures is not None
    if job.quick:
        recipe = replace(recipe, measures=replace(recipe.measures, compile=False))
    _prepare(bench.transformer, bench.config, recipe, bench.device)
    bench.fill_lora()
    for row in job.rows:
        make = optimizer_maker(bench, row)
        optimizer = make(bench.parameters)
        timed = timed_training(bench, optimizer)
        paged = managed_bytes(optimizer)
        optimizer.zero_grad()
        del optimizer
        yield updating_row(
            row,
            timed,
            change_error=relative(changes(bench, make), changes(bench, reference_adamw(bench))),
            note=_optimizer_note(row, paged),
        )


def optimizer_maker(bench: Bench, row: str) -> MakeOptimizer:
    """How to make a row's optimizer."""
    given = bench.adamw()
    if row in ("fused-adamw", "host-adamw"):
        on_host = row == "host-adamw"
        return lambda chosen: make_optimizer(
            bench.config, {str(place): one for place, one in enumerate(chosen)}, on_host=on_host
        )
    if row.startswith("torchao-"):
        optim: Any = import_module("torchao.optim")
        if row == "torchao-offload":
            return lambda chosen: optim.CPUOffloadOptimizer(
                chosen, torch.optim.AdamW, offload_gradients=False, **given
            )
        eight = row == "torchao-adamw8bit"
        return lambda chosen: (optim.AdamW8bit if eight else optim.AdamW4bit)(chosen, **given)
    bitsandbytes: Any = import_module("bitsandbytes")
    paged = row == "bnb-paged-adamw8bit"
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return lambda chosen: kind(chosen, **given)


def reference_adamw(bench: Bench) -> MakeOptimizer:
    return lambda chosen: torch.optim.AdamW(chosen, **bench.adamw(), foreach=False, fused=False)


def managed_bytes(optimizer: Any) -> int:
    """State in memory that driver and device share, which torch does not count."""
    state = getattr(optimizer, "state", {})
    values = [value for of in state.values() for value in of.values() if getattr(value, "is_paged", False)]
    return sum(value.numel() * value.element_size() for value in values)


def _optimizer_note(row: str, paged: int) -> str:
    if row == "torchao-offload":
        return "its copies of the gradients are made before they are clipped"
    return f"{paged / 2**30:.2f} GiB of state in managed memory, not in the peak" if paged else ""


def changes(bench: Bench, make: MakeOptimizer) -> list[Tensor]:
    """What ten updates change in two tensors shaped like a LoRA's, under gradients that are always the same.

    As in real ones, channels differ: their scales spread over about two orders of magnitude. A part of each gradient
    stays over the steps.
    """
    source = torch.Generator().manual_seed(2)
    starts = [torch.randn(128, 3072, generator=source) / 100, torch.zeros(3072, 128)]
    scales = [
        1e-4 * torch.exp(torch.randn(rows, 1, generator=source) + torch.randn(1, columns, generator=source))
        for rows, columns in (start.shape for start in starts)
    ]
    steady = [torch.randn(start.shape, generator=source) for start in starts]
    trained = [nn.Parameter(start.to(bench.device, copy=True)) for start in starts]
    optimizer = make(trained)
    for _ in range(UPDATES):
        for parameter, scale, mean in zip(trained, scales, steady, strict=True):
            gradient = scale * (mean + torch.randn(mean.shape, generator=source))
            # Not set by hand: offloading waits for what autograd adds.
            torch.autograd.backward(parameter, gradient.to(bench.device))
        optimizer.step()
        optimizer.zero_grad()
    _wait(bench.device)
    return [one.detach().cpu() - start for one, start in zip(trained, starts, strict=True)]


# DeepSpeed --------------------------------------------------------------------------------------------------------


def measure_zero(job: Job) -> Iterator[Row]:
    """ZeRO with offloading, in one process."""
    (row,) = job.rows
    join_alone()
    import deepspeed

    bench = Bench(job)
    add_lora(bench.transformer, bench.config)
    bench.fill_lora()
    bench.transformer.enable_gradient_checkpointing()
    optimizer, name = host_optimizer(bench)
    engine, *_ = deepspeed.initialize(
        model=bench.transformer,
        model_parameters=bench.parameters,
        optimizer=optimizer,
        config=zero_settings(ZERO[row]),
    )
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    forward = bench.forward(engine)

    def compute() -> Tensor:
        loss = forward()
        engine.backward(loss)
        return loss

    timed = timed_steps(bench, compute, lambda: engine.step())
    yield updating_row(row, timed, note=f"updates by {name}")
    torch.distributed.destroy_process_group()


def join_alone() -> None:
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in ours.items()})
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        _deepspeed_on_cpu()
    import deepspeed

    deepspeed.init_distributed("gloo" if on_cpu else "nccl", auto_mpi_discovery=False, verbose=False)


def host_optimizer(bench: Bench) -> tuple[Any, str]:
    """DeepSpeed's own AdamW for host memory where it can be built, else torch's fused one."""
    if builds_cpu_adam():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(bench.parameters, **bench.adamw(), adamw_mode=True), "DeepSpeedCPUAdam"
    return torch.optim.AdamW(bench.parameters, **bench.adamw(), fused=True), "torch's AdamW, fused"


def builds_cpu_adam() -> bool:
    """Try it in a process of its own, which may fail or hang; what it built is found again."""
    refused = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "refused"  # the build's lock would stop the next one
    if refused.exists():
        return False
    command = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(BUILD_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its compilers
        code = process.wait()
    if code:
        refused.touch()
    return code == 0


def zero_settings(stage: int) -> dict[str, Any]:
    """Buffers of the size of a block or less; by default they are sized for much larger models."""
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {
        "stage": stage,
        "offload_optimizer": host,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if stage == 3:
        zero |= {
            "offload_param": host,
            "stage3_prefetch_bucket_size": 150_000_000,
            "stage3_max_live_parameters": 300_000_000,
            "stage3_max_reuse_distance": 300_000_000,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


# Processes and the table ------------------------------------------------------------------------------------------


def measure(job: Job) -> None:
    """In a process of its own: print each row as JSON once the parent says that the device is free."""
    import diffusers  # noqa: F401  # takes seconds
    import peft  # noqa: F401

    first = job.rows[0]
    if first in ZERO:
        builds_cpu_adam()
    sys.stdin.readline()
    how = measure_zero if first in ZERO else measure_optimizers if first in OPTIMIZERS else measure_stored
    for row in how(job):
        print(json.dumps(asdict(row)), flush=True)


class Child:
    """A process that measures a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.errors: IO[str] = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # as long as the process
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def rows(self, limit: float) -> Iterator[Row]:
        """Let it begin; its rows as they come, the last one a failure if it did not give all."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        done = 0
        try:
            self._begin()
            for line in self.process.stdout:
                if line.startswith('{"row"'):
                    done += 1
                    yield Row(**json.loads(line))
            code = self.process.wait()
        finally:
            timer.cancel()
        if done < len(self.job.rows):
            self.errors.seek(0)
            why = f"took more than {limit:.0f} s" if late.is_set() else _reason(self.errors.read(), code)
            yield Row(self.job.rows[done], failed=why)

    def _begin(self) -> None:
        """Say that the device is free, if the process has not ended already."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass


def run(jobs: Sequence[Job], limit: float) -> Iterator[Row]:
    """All rows. While a process measures, the next one imports."""
    waiting, following = deque(jobs), None
    while waiting or following:
        child = following or Child(waiting.popleft())
        following = Child(waiting.popleft()) if waiting else None
        seen = 0
        for row in child.rows(limit):
            seen += 1
            yield row
        if rest := child.job.rows[seen:]:
            waiting.append(replace(child.job, rows=rest))


def told(row: Row) -> list[str]:
    """A line of the table."""
    if row.failed:
        return [row.row, *[""] * 7, "FAILED: " + row.failed[:300]]
    seconds = [_number(row.step_s, ".3f"), _number(row.peak_gib, ".2f"), _number(row.first_s, ".1f")]
    errors = [row.prediction_error, row.gradient_error, row.change_error]
    return [
        *(row.row, *seconds, _number(row.update_ms, ".1f")),
        *(_number(error, ".2e") for error in errors),
        row.note,
    ]


HEAD = ["row", "s/step", "peak GiB", "first s", "update ms", "prediction", "gradients", "change", ""]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def versions() -> str:
    """Of what is measured."""
    found = []
    for name in ("torch", "diffusers", "peft", "torchao", "bitsandbytes", "deepspeed"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def chosen_jobs(names: str, steps: int, quick: bool) -> list[Job]:
    """The jobs of the named rows and groups; of all, if none is named."""
    wanted = [row for name in filter(None, names.split(",")) for row in GROUPS.get(name, [name])]
    known = {row for job in JOBS for row in job}
    if unknown := set(wanted) - known:
        raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    picked = [tuple(row for row in job if not wanted or row in wanted) for job in JOBS]
    return [Job(rows, steps, quick) for rows in picked if rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", default="", help="names of rows and groups, separated by commas")
    parser.add_argument("--steps", type=int, default=2, help="timed steps (default 2)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a process may take (300)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        values = json.loads(given.job)
        measure(Job(**{**values, "rows": tuple(values["rows"])}))
        return 0
    jobs = chosen_jobs(given.rows, given.steps, given.quick)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}; {versions()}", flush=True)
    started, rows = time.perf_counter(), []
    with TemporaryDirectory() as extensions:
        os.environ["TORCH_EXTENSIONS_DIR"] = extensions
        for row in run(jobs, given.limit):
            rows.append(row)
            pairs = zip(HEAD[1:], told(row)[1:], strict=True)
            cells = [f"{head} {cell}".strip() for head, cell in pairs if cell]
            print(f"[{time.perf_counter() - started:5.0f} s] {row.row}: {', '.join(cells)}", flush=True)
            if given.json:
                given.json.write_text(json.dumps([asdict(one) for one in rows], indent=1), "utf-8")
    print(aligned([HEAD, *(told(row) for row in rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
