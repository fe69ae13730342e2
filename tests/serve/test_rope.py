"""Rotary embedding on interleaved pairs."""

import math

import pytest
import torch

from magnetar.serve.model.rope import Rotations, rotate, rotations


def test_turns_every_pair_by_its_position_times_its_frequency() -> None:
    theta, head_dim, position = 100.0, 4, 7
    turned = rotate(
        torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]),
        rotations(torch.tensor([position]), head_dim=head_dim, theta=theta),
    )
    slow = position / theta**0.5
    expected = [
        math.cos(position),
        math.sin(position),
        -2 * math.sin(slow),
        2 * math.cos(slow),
    ]
    assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(query_position: int, key_position: int) -> float:
        turns = rotations(torch.tensor([query_position, key_position]), head_dim=16, theta=1e4)
        return float((rotate(query, turns[:1]) * rotate(key, turns[1:])).sum())

    assert score(9, 4) == pytest.approx(score(205, 200), abs=1e-4)


def test_keeps_the_dtype_and_does_not_touch_its_input() -> None:
    x = torch.ones(2, 3, 8, dtype=torch.bfloat16)
    turned = rotate(x, rotations(torch.tensor([3, 5]), head_dim=8, theta=1e4))
    assert turned.dtype is torch.bfloat16
    assert turned.shape == x.shape
    assert bool((x == 1).all())


def test_kept_rotations_are_those_of_their_positions_however_far_they_reach() -> None:
    kept = Rotations(head_dim=48, theta=1e6, device=torch.device("cpu"))
    for end in (1, 5, 1024, 1025, 7, 5000):
        turns = kept.until(end)
        assert len(turns) >= end
        positions = torch.tensor([0, end // 2, end - 1])
        computed = rotations(positions, head_dim=48, theta=1e6)
        assert torch.equal(turns.index_select(0, positions), computed)
