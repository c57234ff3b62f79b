"""What the demo does with which model: a small one with trained weights where there is one, else a tiny random one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogcache.errors import ConfigError
from cogcache.small import Kind, small_model
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH
from cogcache.small.shipped import WEIGHTS
from cogcache.tiny import Family, build_tiny_model

__all__ = ["Recipe", "Task", "choose_recipe"]

Task = Literal["t2v", "i2v"]

_SMALL: dict[str, Kind] = {"5b": "t2v", "5b-i2v": "i2v", "1.5-5b": "t2v-1.5"}
_OF_TASK: dict[Task, dict[Family, Family]] = {
    "t2v": {"2b": "2b", "5b": "5b", "1.5-5b": "1.5-5b"},
    "i2v": {"5b": "5b-i2v", "5b-i2v": "5b-i2v", "1.5-5b": "1.5-5b-i2v", "1.5-5b-i2v": "1.5-5b-i2v"},
}


@dataclass(frozen=True)
class Recipe:
    """The demo's model and settings.

    Attributes:
        kind: Of the small model; None where the tiny one is taken.
        steps: Optimizer steps.
    """

    family: Family
    kind: Kind | None
    steps: int

    @property
    def what(self) -> str:
        """The model in words."""
        if self.kind:
            return f"small {self.family} model with trained weights"
        return f"tiny {self.family} model with random weights"

    @property
    def remark(self) -> str:
        """What to expect of what is generated."""
        if self.kind:
            told = f"Base and LoRA begin with the same noise. The LoRA learned eight clips, in {self.steps} steps"
            return f"{told}{'.' if self.kind == 'i2v' else ': colours and layout, hardly any figures.'}"
        return (
            "This model's weights are random, so what it generates is noise: this shows the way, not quality."
        )

    @property
    def shown(self) -> tuple[int, ...]:
        """Numbers of the clips that are generated and shown."""
        return (5, 2) if self.kind else (5,)

    @property
    def seeds(self) -> int:
        """Generations of each clip."""
        return 2 if self.kind else 1

    def make_model(self, out: Path) -> Path:
        """Write the model's folder, unless it is there."""
        if out.is_dir():
            return out
        return small_model(self.kind, out) if self.kind else build_tiny_model(out, self.family)

    def encode(self) -> dict[str, Any]:
        """Settings of ``cogcache encode`` besides the paths."""
        if not self.kind:
            return {}
        clip = {"frames": FRAMES, "size": f"{HEIGHT}x{WIDTH}", "fps": "8"}
        draws = {"image_draws": 4} if self.kind == "i2v" else {}
        return clip | {"vae_dtype": "float32", "text_dtype": "float32"} | draws

    def train(self) -> dict[str, Any]:
        """Settings of ``cogcache train`` besides the paths."""
        if not self.kind:
            return {"rank": 16, "alpha": 8, "lr": 2e-3}
        return {
            "rank": 64,
            "alpha": 64,
            "lr": 4e-3,
            "lr_scheduler": "cosine",
            "batch_size": 4,
            "target_modules": ["attention+ff"],
            "memory": "plain",
            "gradient_checkpointing": False,
            "dtype": "float32",
        }

    def infer(self) -> dict[str, Any]:
        """Settings of ``cogcache infer`` besides the paths."""
        if not self.kind:
            return {"steps": 10}
        # Eight clips are learned so closely that guidance only washes their colours out, at twice the time.
        return {"steps": 20, "guidance": 1.0, "dtype": "float32", "tiling": False}


def choose_recipe(family: Family | None, task: Task | None, steps: int | None) -> Recipe:
    """What to do for the given flags; None is the default.

    Raises:
        ConfigError: if no model of the family does the task.
    """
    start: Family = family or "5b"
    chosen = _OF_TASK[task].get(start) if task else start
    if chosen is None:
        raise ConfigError(
            f"there is no {task} model of family {start}.",
            f"Leave --task out, or choose --family {' or '.join(_OF_TASK[task or 't2v'])}.",
        )
    kind = _SMALL.get(chosen)
    if kind and not (WEIGHTS / kind).is_dir():
        kind = None
    return Recipe(chosen, kind, steps or (130 if kind else 60))
