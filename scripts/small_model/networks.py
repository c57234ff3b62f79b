"""Training of the VAE and of the text encoder: what ``cogcache`` itself has no command for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from shown import Size, Source, draw
from torch import Tensor, nn
from torch.nn import functional

KL_WEIGHT = 1e-6
MASKED = 0.3


def psnr(vae: Any, clips_bfhwc: Tensor, device: torch.device) -> list[float]:
    """PSNR in dB of the decoded posterior mean of each uint8 clip [F, H, W, 3]."""
    values = []
    with torch.inference_mode():
        for clip in clips_bfhwc:
            pixels = to_pixels(clip[None].to(device))
            decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
            values.append(float(10 * torch.log10(4 / (decoded - pixels).square().mean())))
    return values


def to_pixels(clips_bfhwc: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in -1..1."""
    return clips_bfhwc.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


class Rebuild(nn.Module):
    """A VAE's way there and back: what it makes of pixels by a posterior sample, and the KL term."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_bcfhw: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels_bcfhw).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean()


def train_vae(
    vae: Any, kinds: Sequence[Source], device: torch.device, *, steps: int, batch: int, crop: Size
) -> None:
    """Reconstruction and a small KL term.

    Errors count by L1, by L1 of neighbours' differences, which keeps edges sharp, and by their squares, which PSNR is
    made of. On a GPU float32 weights are computed with in bfloat16, norms too: small layers are bound by memory.

    Args:
        kinds: What to show, in turn; one that is named twice comes twice as often.
        crop: Frames, height and width of what is shown.
    """
    vae.requires_grad_(True).train().to(device)
    rebuild, dtype = Rebuild(vae), torch.bfloat16 if device.type == "cuda" else torch.float32

    def loss(clips_bfhwc: Tensor) -> Tensor:
        pixels = to_pixels(clips_bfhwc)
        weights = {name: weight.to(dtype) for name, weight in rebuild.named_parameters()}
        decoded, kl = torch.func.functional_call(rebuild, weights, (pixels.to(dtype),))
        away = decoded.float() - pixels
        edges = away.diff(dim=-1).abs().mean() + away.diff(dim=-2).abs().mean()
        return away.abs().mean() + 0.5 * edges + 2 * away.square().mean() + KL_WEIGHT * kl.float()

    _optimise(
        "vae",
        vae.parameters(),
        lambda: draw(kinds, batch, crop),
        loss,
        steps,
        lr=1e-3,
        record=device.type == "cuda",
    )
    vae.requires_grad_(False).eval()


def calibrate(vae: Any, clips_bfhwc: Tensor, device: torch.device, scaling_factor: float) -> float:
    """Give latents the spread ``1 / scaling_factor``, so that the families' scale facts hold; the spread they had.

    The last layer of the encoder and all layers of the decoder that see latents are scaled; reconstructions stay.
    """
    with torch.inference_mode():
        latents = [vae.encode(to_pixels(clip[None].to(device))).latent_dist.mean for clip in clips_bfhwc]
    spread = float(torch.cat(latents).std())
    gain = 1 / (scaling_factor * spread)
    out = vae.encoder.conv_out.conv
    channels = out.out_channels // 2
    with torch.no_grad():
        out.weight[:channels] *= gain
        out.bias[:channels] *= gain
        out.bias[channels:] += 2 * math.log(gain)
        for name, module in vae.decoder.named_modules():
            if name == "conv_in" or name.endswith(("conv_y", "conv_b")):
                module.conv.weight /= gain
    return spread


def train_text(
    encoder: Any, tokenizer: Any, captions: Sequence[str], device: torch.device, *, steps: int, batch: int
) -> None:
    """Teach it what a caption says: to tell masked words, and at every position, padding too, what the caption says.

    By masked words alone, words that no other word hints at, as colours, end as all but the same, each at its own
    position, and a transformer of few layers does not learn to look there. A large T5 spreads meaning by itself.
    """
    encoder.requires_grad_(True).train().to(device)
    ids = tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids.to(device)
    told = words_told(ids, len(tokenizer), tokenizer.pad_token_id)
    mask_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    masked_head, all_head = (nn.Linear(encoder.config.d_model, len(tokenizer)).to(device) for _ in range(2))

    def draw() -> Tensor:
        return torch.randint(len(ids), (batch,), device=device)

    def loss(drawn: Tensor) -> Tensor:
        rows = ids[drawn]
        hidden = (torch.rand(rows.shape, device=device) < MASKED) & (rows != tokenizer.pad_token_id)
        seen = encoder(torch.where(hidden, mask_id, rows))[0]
        masked = functional.cross_entropy(masked_head(seen[hidden]), rows[hidden])
        known = all_head(encoder(rows)[0])
        wanted = told[drawn][:, :, None].expand(-1, -1, rows.shape[1])
        every = functional.cross_entropy(known.transpose(1, 2), wanted)
        return masked + every

    heads = [*masked_head.parameters(), *all_head.parameters()]
    _optimise("text", [*encoder.parameters(), *heads], draw, loss, steps, lr=1e-3)
    encoder.requires_grad_(False).eval()


def words_told(ids: Tensor, words: int, padding: int) -> Tensor:
    """What captions say: [N, words] for ids [N, length], each row's sum 1.

    A word counts by its information, ``-log`` of the share of captions that have it: alike, the few that tell captions
    apart, such as a colour, are a small part of the loss and are learned late.
    """
    has = torch.zeros(len(ids), words, device=ids.device).scatter_(1, ids, 1.0)
    has[:, padding] = 0
    told = has * -has.mean(0).clamp_min(1 / len(ids)).log()
    return told / told.sum(1, keepdim=True).clamp_min(1e-6)


def _optimise(
    name: str,
    parameters: Iterable[nn.Parameter],
    draw: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    *,
    record: bool = False,
) -> None:
    """AdamW with a warm-up and a cosine to zero; tells how it goes twenty times.

    Args:
        record: Replay the step as a CUDA graph: small layers take the processor longer to launch than the GPU to run.
    """
    weights = list(parameters)
    rate = torch.tensor(lr, device=weights[0].device) if record else lr
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, capturable=record)
    warm_up = min(100, steps // 10 + 1)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))),
    )

    def update(drawn: Tensor) -> Tensor:
        value = loss(drawn)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return value.detach()

    work = _recorded(update, draw(), optimizer) if record else update
    started = time.perf_counter()
    for step in range(1, steps + 1):
        value = work(draw())
        if not record:
            optimizer.zero_grad(set_to_none=True)
        shape.step()
        if step % max(1, steps // 20) == 0:
            spent = time.perf_counter() - started
            print(f"{name}: step {step} of {steps}, loss {float(value):.4f}, {spent:.0f} s", flush=True)


def _recorded(
    update: Callable[[Tensor], Tensor], drawn: Tensor, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor], Tensor]:
    """``update`` as a CUDA graph, after the few plain ones that have it allocate its state."""
    place, aside = drawn.clone(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            update(place)
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = update(place)

    def replay(drawn: Tensor) -> Tensor:
        place.copy_(drawn)
        graph.replay()
        return value

    return replay
