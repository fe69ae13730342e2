"""Experts of a layer that lie on several hosts: a home, where attention is, and helpers.

Rows travel to the host of their expert and the outputs come back as they are, not weighted: the
home sums them as if all had been computed there, in fp32 and in the same order. Rows leave first,
then the home computes its own share, then it takes what came back.

Shapes: T tokens, C model width, E experts, K experts per token, A assignments of a token to an
expert; R rows, the distinct tokens among the assignments of one host.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from .divide import divide
from .moe import Experts


class RemoteExperts(Protocol):
    """Experts on another host. Every `send` is followed by one `receive`."""

    def send(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> None:
        """Ask for the outputs of experts, each for a row of `x_RC`, which is on any device.

        Raises:
            StageLostError: the host is gone.
        """
        ...

    def receive(self) -> torch.Tensor:
        """The outputs [A, C] on the CPU, in the order that they were asked for; blocks.

        Raises:
            StageLostError: the host is gone, or failed.
        """
        ...


class HeldExperts:
    """Some of a layer's experts, called by their ids in the model."""

    def __init__(self, ids: Sequence[int], experts: Experts) -> None:
        """`experts` are those of `ids`, in that order."""
        self.ids = tuple(ids)
        self._experts = experts
        self._index_of: Mapping[int, int] = {expert: n for n, expert in enumerate(ids)}

    def outputs(
        self, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> torch.Tensor:
        """[A, C]: of each expert, for its row of `x_RC`. KeyError for one that is not held."""
        index_A = torch.tensor([self._index_of[e] for e in experts_A], device=x_RC.device)
        if len(x_RC) == 1:
            return self._experts.forward(x_RC, index_A.unsqueeze(0))
        x_AC = x_RC.index_select(0, torch.tensor(rows_A, device=x_RC.device))
        return self._experts.forward(x_AC, index_A.unsqueeze(1))


class SpreadExperts:
    """All experts of a layer, those of its home and of its helpers, as `Experts`."""

    def __init__(self, layer_id: int, *, num_experts: int, held: HeldExperts) -> None:
        """The home's own; `join` says where the others are."""
        self._layer_id = layer_id
        self._num_experts = num_experts
        self._held = held
        self._helpers: list[RemoteExperts] = []
        self._hosts_E: list[list[int]] = []

    def join(self, helpers: Sequence[tuple[RemoteExperts, Sequence[int]]]) -> None:
        """Use these helpers from now on, each for the experts with its ids; copies are allowed.

        Raises:
            ValueError: an expert is nowhere.
        """
        holders = [self._held.ids, *(ids for _, ids in helpers)]
        hosts_E = [
            [host for host, ids in enumerate(holders) if expert in ids]
            for expert in range(self._num_experts)
        ]
        if homeless := [expert for expert, hosts in enumerate(hosts_E) if not hosts]:
            raise ValueError(f"the experts {homeless} of layer {self._layer_id} are on no host")
        self._helpers, self._hosts_E = [helper for helper, _ in helpers], hosts_E

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """See `Experts.forward`; StageLostError where a helper is gone."""
        num_chosen = experts_TK.shape[1]
        experts_A = experts_TK.flatten().tolist()
        own, *others = divide(experts_A, self._hosts_E, num_hosts=1 + len(self._helpers))
        sent = [each for each in zip(self._helpers, others, strict=True) if each[1]]
        for helper, share in sent:
            helper.send(self._layer_id, *_asked(x_TC, share, experts_A, num_chosen))
        y_AC = x_TC.new_empty(len(experts_A), x_TC.shape[1])
        if own:
            _put(y_AC, own, self._held.outputs(*_asked(x_TC, own, experts_A, num_chosen)))
        for helper, share in sent:
            _put(y_AC, share, helper.receive().to(x_TC.device))
        return y_AC


def _asked(
    x_TC: torch.Tensor, share: Sequence[int], experts_A: Sequence[int], num_chosen: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """The distinct rows of a share, the row of each of its assignments, and the expert of each."""
    row_of: dict[int, int] = {}
    rows = [row_of.setdefault(position // num_chosen, len(row_of)) for position in share]
    if len(row_of) < len(x_TC):
        x_TC = x_TC.index_select(0, torch.tensor(list(row_of), device=x_TC.device))
    return x_TC, rows, [experts_A[position] for position in share]


def _put(y_AC: torch.Tensor, share: Sequence[int], part_AC: torch.Tensor) -> None:
    y_AC.index_copy_(0, torch.tensor(share, device=y_AC.device), part_AC)
