"""Runs seeded cases of one kind of hostile input and counts how they end."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hostile_guard import Guard, HangError, little_memory

from cogcache.errors import CogcacheError

__all__ = ["Outcome", "Target", "run_cases"]

Case = Callable[[random.Random], None]
"""Makes one hostile input from the source of randomness and gives it to the program."""


@dataclass
class Target:
    """One kind of input: ``folders`` are those that a case may read and write, ``ports`` those of
    this machine that it may talk to."""

    name: str
    case: Case
    folders: tuple[Path, ...]
    ports: tuple[int, ...] = ()


@dataclass
class Outcome:
    """How the cases ended. ``findings`` are those that ended as none may, each with the seed that repeats it."""

    name: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common())
        return (
            f"{self.name}: {self.cases} cases, {self.accepted} read, {self.refused} refused ({kinds}), "
            f"{len(self.findings)} findings"
        )


def run_cases(target: Target, count: int, first_seed: int = 0, most_findings: int = 20) -> Outcome:
    """Run ``count`` cases. Each either works or raises one of our errors with a text; all else is a finding."""
    outcome = Outcome(target.name)
    guard = Guard(*target.folders, ports=target.ports)
    with little_memory():
        for seed in range(first_seed, first_seed + count):
            _run(target, seed, guard, outcome)
            if len(outcome.findings) >= most_findings:
                break
    return outcome


def _run(target: Target, seed: int, guard: Guard, outcome: Outcome) -> None:
    outcome.cases += 1
    source = random.Random(f"{target.name} {seed}")
    try:
        with guard.watching():
            target.case(source)
        outcome.accepted += 1
    except CogcacheError as error:
        outcome.refused += 1
        outcome.kinds[type(error).__name__] += 1
        if not str(error).strip():
            outcome.findings.append(f"seed {seed}: {type(error).__name__} without a text")
    except (Exception, HangError) as error:
        place = traceback.extract_tb(error.__traceback__)[-6:]
        trace = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(place))
        outcome.findings.append(f"seed {seed}: {type(error).__name__}: {error!s:.200} [{trace}]")
    outcome.findings += [f"seed {seed}: {breach}" for breach in guard.breaches]
    guard.breaches.clear()
