"""What the rows of ``cogcache bench train`` come to beside each other: as JSON values and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from cogcache.bench.train import FailedRow, StepRow

__all__ = ["reference_seconds", "row_values", "train_table"]


def reference_seconds(rows: Sequence[StepRow | FailedRow]) -> float | None:
    """Seconds a step of the reference recipe; None where it was not measured."""
    return next((row.step_s for row in rows if isinstance(row, StepRow) and row.recipe == "reference"), None)


def row_values(rows: Sequence[StepRow | FailedRow]) -> list[dict[str, Any]]:
    """The rows with what follows from them; a row that failed as it is.

    ``ratio`` is how many times as fast as the reference recipe's a step is, None where that was not measured;
    ``samples_per_s_per_gib`` is for each GiB of GPU memory at the peak.
    """
    reference = reference_seconds(rows)
    return [asdict(row) if isinstance(row, FailedRow) else _values(row, reference) for row in rows]


def _values(row: StepRow, reference: float | None) -> dict[str, Any]:
    rate = row.batch_size / row.step_s
    return {
        **asdict(row),
        "ratio": reference / row.step_s if reference else None,
        "samples_per_s_per_gib": rate / row.peak_gib if row.peak_gib else None,
    }


_COLUMNS = {
    "s/step": ("step_s", ".3f"),
    "ratio": ("ratio", ".2f"),
    "planned s": ("predicted_s", ".3f"),
    "peak GiB": ("peak_gib", ".2f"),
    "planned GiB": ("predicted_gib", ".2f"),
    "samples/s per GiB": ("samples_per_s_per_gib", ".3g"),
}
"""Headings, with the name of each value and how it is written."""


def train_table(rows: Sequence[StepRow | FailedRow]) -> Table:
    """A row for each recipe; of one that failed no more than that."""
    table = Table("recipe", *_COLUMNS)
    for row in row_values(rows):
        figures = [format(row[name], how) if row.get(name) else "" for name, how in _COLUMNS.values()]
        table.add_row(row["recipe"], *(["failed"] if "failed" in row else figures))
    return table
