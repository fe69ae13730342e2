"""One step laid out for the model: built once per step, shared by all layers of a stage.

Shapes: T tokens of the step, Q tokens of one row, L keys that the row sees, B blocks of the row,
P rotary pairs.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...fetcher.config import ModelConfig
from ...settings import KV_BLOCK_TOKENS
from ..engine.step import StepRow
from .rope import Rotations


@dataclass(frozen=True, kw_only=True)
class Span:
    """One row of a step: which tokens ask, and which keys they see.

    The keys lie in the slots ``first_slot .. first_slot + num_keys`` of the cache when
    `block_ids_B` is None, else in the same range of those blocks put one after the other.
    """

    start: int
    """The row's first token in the step."""
    num_tokens: int
    position: int
    """Of the first token."""
    window: int | None
    """How many keys a token sees, itself among them; None: all before it."""
    block_ids_B: torch.Tensor | None
    first_slot: int
    num_keys: int
    is_causal: bool
    """The keys begin where the row does, and the window hides none of them."""
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def mask_QL(self) -> torch.Tensor | None:
        """Added to the scores; None where every token sees every key, or `is_causal` says it all.

        Made when an attention asks, for all layers: some ways need none, and deep in a prompt it is
        the largest thing of a step.
        """
        if self.num_tokens == 1 or self.is_causal:
            return None
        end_position = self.position + self.num_tokens
        positions_Q = torch.arange(self.position, end_position, device=self.device)
        queries_Q1 = positions_Q.unsqueeze(1)
        keys_L = torch.arange(end_position - self.num_keys, end_position, device=self.device)
        hidden_QL = keys_L > queries_Q1
        if self.window is not None:
            hidden_QL |= keys_L <= queries_Q1 - self.window
        mask_QL = torch.zeros(hidden_QL.shape, dtype=self.dtype, device=self.device)
        return mask_QL.masked_fill_(hidden_QL, float("-inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """The rows of a step and their block tables as compiled functions take them."""

    positions: array[int]
    """Of every token."""
    slots: array[int]
    """Where each token's key and value go: block id times block size plus offset."""
    spans: array[int]
    """Four numbers a row: first token in the step, tokens, position, where its table begins."""
    block_ids: array[int]
    """The tables one after the other, each from position 0 on."""


class Batch:
    """All rows of a step; what only one way of attention needs is made when it first asks."""

    def __init__(
        self,
        rows: Sequence[StepRow],
        tables: Sequence[Sequence[int]],
        *,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        rotations: Rotations,
    ) -> None:
        self._rows = rows
        self._tables = tables
        self._window = config.sliding_window
        self._dtype = dtype
        self._device = device
        spans, block_ids = array("q"), array("q")
        positions, slots = array("q"), array("q")
        end = 0
        for row, table in zip(rows, tables, strict=True):
            spans.extend((len(positions), len(row.token_ids), row.position, len(block_ids)))
            block_ids.extend(table)
            end = max(end, row.position + len(row.token_ids))
            for position in range(row.position, row.position + len(row.token_ids)):
                positions.append(position)
                block, offset = divmod(position, KV_BLOCK_TOKENS)
                slots.append(table[block] * KV_BLOCK_TOKENS + offset)
        self.pages = Pages(positions=positions, slots=slots, spans=spans, block_ids=block_ids)
        self.turns_L1P = rotations.until(end)
        """The rotation of each position up to the last of the step, at least."""

    @functools.cached_property
    def slots_T(self) -> torch.Tensor:
        """See `Pages.slots`."""
        return torch.tensor(self.pages.slots.tolist(), device=self._device)

    @functools.cached_property
    def rotations_T1P(self) -> torch.Tensor:
        """The rotation of each token."""
        positions_T = torch.tensor(self.pages.positions.tolist(), device=self._device)
        return self.turns_L1P.index_select(0, positions_T)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """One per row, in their order."""
        spans, start = [], 0
        for row, table in zip(self._rows, self._tables, strict=True):
            spans.append(_span(row, table, start, self._window, self._dtype, self._device))
            start += len(row.token_ids)
        return tuple(spans)


def lay_out(
    rows: Sequence[StepRow],
    tables: Mapping[int, Sequence[int]],
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    rotations: Rotations | None = None,
) -> Batch:
    """A step whose block tables already hold the rows' new blocks, and do not change meanwhile.

    `rotations` of the model are kept from step to step; without them they are computed anew.

    Raises:
        ValueError: a row has no tokens, or reaches past the end of its block table.
    """
    for row in rows:
        table = tables.get(row.request_id, ())
        end_position = row.position + len(row.token_ids)
        if not row.token_ids or end_position > len(table) * KV_BLOCK_TOKENS:
            raise ValueError(
                f"request {row.request_id}: tokens {row.position}..{end_position} do not fit a "
                f"table of {len(table)} KV blocks; the engine must send the blocks with the row"
            )
    return Batch(
        rows,
        [tables[row.request_id] for row in rows],
        config=config,
        dtype=dtype,
        device=device,
        rotations=rotations or rotations_of(config, device),
    )


def rotations_of(config: ModelConfig, device: torch.device) -> Rotations:
    """As the model turns its queries and keys."""
    return Rotations(head_dim=config.head_dim, theta=config.rope_theta, device=device)


def _span(
    row: StepRow,
    table: Sequence[int],
    start: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Span:
    """The row's keys: every block from the first that its first token can still see."""
    num_tokens = len(row.token_ids)
    end_position = row.position + num_tokens
    first_position = 0 if window is None else max(0, row.position - window + 1)
    first_block = first_position // KV_BLOCK_TOKENS
    block_ids = table[first_block : -(-end_position // KV_BLOCK_TOKENS)]
    offset = first_position - first_block * KV_BLOCK_TOKENS
    # Blocks that lie side by side are read in place: at 512 keys a gather cost half as much as
    # the attention itself.
    side_by_side = list(block_ids) == list(range(block_ids[0], block_ids[0] + len(block_ids)))
    return Span(
        start=start,
        num_tokens=num_tokens,
        position=row.position,
        window=window,
        block_ids_B=None if side_by_side else torch.tensor(block_ids, device=device),
        first_slot=offset + (block_ids[0] * KV_BLOCK_TOKENS if side_by_side else 0),
        num_keys=end_position - first_position,
        is_causal=num_tokens > 1 and row.position == 0 and (window is None or num_tokens <= window),
        dtype=dtype,
        device=device,
    )
