"""The demo as one short HTML page that needs nothing else: videos as animated pictures, side by side.

As in the gallery of ``cogcache inspect``, its policy allows the page's own style by its hash, pictures from data URIs,
and nothing from anywhere.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from cogcache.demo.picture import draw_losses
from cogcache.demo.show import Clip, Frames, Show
from cogcache.inspect.gallery import allowed

__all__ = ["demo_page"]

_QUALITY = 80


def demo_page(content: Show) -> str:
    """The whole page."""
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {allowed(style)}; base-uri 'none'; form-action 'none'"
    )
    clips = "\n".join(_clip(clip, content.fps) for clip in content.clips)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(content.title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escape(content.title)}</h1>
<p class="remark">{escape(content.remark)}</p>
{clips}
<h2>Training loss (per step, and its running mean)</h2>
<img class="curve" alt="Loss against steps" src="{_losses(content)}">
<p>Clips: Big Buck Bunny, © 2008 Blender Foundation, CC BY 3.0.</p>
</body>
</html>
"""


def _clip(clip: Clip, fps: float) -> str:
    shown = [
        ("Real", "the clip this caption belongs to", clip.real),
        ("Decoded", f"what the VAE makes of its stored latents, {clip.psnr_db:.1f} dB", clip.decoded),
    ]
    for made in clip.generations:
        shown += [("Base", f"seed {made.seed}", made.base), ("LoRA", f"seed {made.seed}", made.lora)]
    figures = "\n".join(
        f'<figure><img alt="{name}" src="{_animation(frames, fps)}">'
        f"<figcaption><b>{name}</b> {says}</figcaption></figure>"
        for name, says, frames in shown
    )
    return f'<h2>“{escape(clip.caption)}”</h2>\n<div class="videos">\n{figures}\n</div>'


def _animation(frames: Frames, fps: float) -> str:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    data = io.BytesIO()
    options = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
    first.save(data, "WEBP", quality=_QUALITY, **options)
    return _uri(data, "webp")


def _losses(content: Show) -> str:
    data = io.BytesIO()
    draw_losses(content.losses, 1120).save(data, "PNG", optimize=True)
    return _uri(data, "png")


def _uri(data: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
