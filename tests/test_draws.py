"""Draws depend on their parts and on nothing else."""

from __future__ import annotations

import torch

from cogcache.draws import generator, seed_for, uniform


def test_a_draw_is_a_function_of_its_parts() -> None:
    first = torch.randn(4, generator=generator(42, 0, "clip", "noise"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=generator(42, 0, "clip", "noise")))
    others = [
        (43, 0, "clip", "noise"),
        (42, 1, "clip", "noise"),
        (42, 0, "clop", "noise"),
        (42, 0, "clip", "x"),
    ]
    for parts in others:
        assert not torch.equal(first, torch.randn(4, generator=generator(*parts)))


def test_parts_do_not_run_together() -> None:
    assert len({seed_for("ab", "c"), seed_for("a", "bc"), seed_for("abc"), seed_for("abc", "")}) == 4


def test_seeds_never_change() -> None:
    """They are in every run ever made: a change would break resuming and repeating old runs."""
    assert seed_for(42, 0, "clip", "noise") == seed_for("42", "0", "clip", "noise")
    assert seed_for(42, 3, "0123456789abcdef", "timestep") == 3619085191849606212


def test_uniform_is_uniform() -> None:
    draws = torch.tensor([uniform(7, n, "timestep") for n in range(20_000)], dtype=torch.float64)
    assert 0 <= draws.min() < draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
    assert 0 <= seed_for("anything") < 2**63
