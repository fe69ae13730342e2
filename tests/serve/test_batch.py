"""The tensors of one step."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import StepRow
from magnetar.serve.model.batch import Batch, Span, lay_out
from magnetar.settings import KV_BLOCK_TOKENS

CONFIG = ModelConfig(
    dim=16,
    n_layers=1,
    head_dim=8,
    hidden_dim=32,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=256,
)


def batch_of(table: list[int], row: StepRow, window: int | None = None) -> Batch:
    return lay_out(
        [row],
        {row.request_id: table},
        config=dataclasses.replace(CONFIG, sliding_window=window),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def row_of(position: int, num_tokens: int) -> StepRow:
    return StepRow(request_id=1, position=position, token_ids=(5,) * num_tokens)


def slots_seen(span: Span) -> list[int]:
    """Slots of the cache in the order of the row's keys."""
    if span.block_ids_B is None:
        return list(range(span.first_slot, span.first_slot + span.num_keys))
    slots = [
        block * KV_BLOCK_TOKENS + offset
        for block in span.block_ids_B.tolist()
        for offset in range(KV_BLOCK_TOKENS)
    ]
    return slots[span.first_slot : span.first_slot + span.num_keys]


@given(
    table=st.permutations(range(8)),
    position=st.integers(0, 100),
    num_tokens=st.integers(1, 20),
    window=st.none() | st.integers(1, 40),
)
def test_every_token_sees_itself_and_what_its_window_holds(
    table: list[int], position: int, num_tokens: int, window: int | None
) -> None:
    batch = batch_of(table, row_of(position, num_tokens), window)
    (span,) = batch.spans

    def slot(at: int) -> int:
        return table[at // KV_BLOCK_TOKENS] * KV_BLOCK_TOKENS + at % KV_BLOCK_TOKENS

    end = position + num_tokens
    assert batch.slots_T.tolist() == [slot(at) for at in range(position, end)]
    seen = slots_seen(span)
    for query in range(num_tokens):
        at = position + query
        first = 0 if window is None else max(0, at - window + 1)
        expected = [slot(key) for key in range(first, at + 1)]
        if span.mask_QL is not None:
            visible = (span.mask_QL[query] == 0).tolist()
        else:
            last = query if span.is_causal else len(seen) - 1
            visible = [key <= last for key in range(len(seen))]
        assert [s for s, shown in zip(seen, visible, strict=True) if shown] == expected


def test_blocks_side_by_side_are_read_in_place() -> None:
    (span,) = batch_of([4, 5, 6], row_of(40, 1)).spans
    assert span.block_ids_B is None
    assert span.first_slot == 4 * KV_BLOCK_TOKENS
    assert span.num_keys == 41


def test_only_the_blocks_of_the_window_are_read() -> None:
    (span,) = batch_of([7, 3, 9, 1], row_of(60, 1), window=20).spans
    assert span.block_ids_B is not None
    assert span.block_ids_B.tolist() == [9, 1]
    assert span.num_keys == 20


def test_decoding_and_a_whole_prompt_need_no_mask() -> None:
    (decoding,) = batch_of([2], row_of(9, 1)).spans
    (prompt,) = batch_of([2], row_of(0, 9)).spans
    assert decoding.mask_QL is None
    assert not decoding.is_causal
    assert prompt.mask_QL is None
    assert prompt.is_causal


@pytest.mark.parametrize(("position", "num_tokens"), [(0, 0), (0, 33), (32, 1)])
def test_refuses_rows_without_tokens_or_without_room(position: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="2 KV blocks"):
        batch_of([0, 1], row_of(position, num_tokens))
