"""The sparse feed-forward layer: every token goes to its `num_experts_per_tok` best experts.

Shapes: T tokens, C model width, E experts, K experts per token, A = T * K assignments
(token-major), I hidden width, F = 2 * I.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from ...fetcher.config import ModelConfig
from .compiled import MOST_CHOSEN
from .feed_forward import FeedForward, gated
from .linear import Linear, trusted_rows
from .rows import RowsLinear
from .traffic import ExpertTraffic

ExpertsKind = Literal["loop", "grouped_mm"]


class Experts(Protocol):
    """All experts of a layer; the ways to compute them differ in how they hold their weights."""

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Outputs [A, C] of the chosen experts for every token, not yet weighted."""
        ...


class LoopExperts:
    """Assignments sorted by expert, one product per expert that has any; waits for the device.

    The best there is on a CPU: gathering weights per token took 3 to 11 times as long.
    """

    def __init__(self, experts: Sequence[FeedForward]) -> None:
        self.experts = experts

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """[A, C]"""
        num_tokens, num_chosen = experts_TK.shape
        if num_tokens == 1:
            return torch.cat([self.experts[e].forward(x_TC) for e in experts_TK.flatten().tolist()])
        experts_A = experts_TK.flatten()
        order_A = experts_A.argsort(stable=True)
        x_AC = x_TC.index_select(0, order_A // num_chosen)
        counts = [0] * len(self.experts)
        for expert in experts_A.tolist():
            counts[expert] += 1
        parts = zip(self.experts, torch.split(x_AC, counts), strict=True)
        y_AC = torch.cat([expert.forward(part) for expert, part in parts if len(part)])
        return torch.empty_like(y_AC).index_copy_(0, order_A, y_AC)


class GroupedExperts:
    """Assignments sorted by expert, all experts in one kernel; never waits for the device.

    Needs rows of a multiple of 16 bytes, and on CUDA bf16 and compute capability 8.0 or later.
    """

    def __init__(self, *, w13: torch.Tensor, w2: torch.Tensor) -> None:
        self.w13 = w13
        """[E, 2 * I, C], `w1` above `w3`"""
        self.w2 = w2
        """[E, C, I]"""

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """[A, C]"""
        sorted_A, order_A = experts_TK.flatten().sort(stable=True)
        # Where each group ends, without bincount: that would need its size on the host.
        every_expert_E = torch.arange(len(self.w2), device=x_TC.device)
        ends_E = torch.searchsorted(sorted_A, every_expert_E, right=True).to(torch.int32)
        x_AC = x_TC.index_select(0, order_A // experts_TK.shape[1])
        h_AF = F.grouped_mm(x_AC, self.w13.transpose(-2, -1), offs=ends_E)
        y_AC = F.grouped_mm(gated(h_AF), self.w2.transpose(-2, -1), offs=ends_E)
        return torch.empty_like(y_AC).index_copy_(0, order_A, y_AC)


def default_experts_kind(*, dtype: torch.dtype, device: torch.device) -> ExpertsKind:
    """What suits the device."""
    return "grouped_mm" if device.type == "cuda" and dtype is torch.bfloat16 else "loop"


class MoeLayer:
    """The router `gate` and the `experts`."""

    def __init__(self, config: ModelConfig, *, gate: Linear, experts: Experts) -> None:
        self.gate = gate
        """C -> E"""
        self.experts = experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.traffic = ExpertTraffic(config.num_experts)

    def route(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of every token [T, K] and their weights [T, K] in fp32, which sum to 1.

        The softmax is over the chosen logits only: the same as a softmax over all of them,
        renormalised. Compiled, it is that of `FusedFeedForward` to the bit, and of equally good
        experts the first is chosen.
        """
        logits_TE, num_chosen = self.gate(x_TC), self.num_experts_per_tok
        rows = trusted_rows() if isinstance(self.gate, RowsLinear) else None
        if rows is None or num_chosen > MOST_CHOSEN:
            logits_TK, experts_TK = logits_TE.topk(num_chosen, dim=-1)
            return experts_TK, logits_TK.softmax(dim=-1, dtype=torch.float32)
        num_tokens, num_experts = logits_TE.shape
        experts_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
        weights_TK = torch.empty(num_tokens, num_chosen)
        rows.route(
            logits_TE.data_ptr(),
            num_tokens,
            num_experts,
            num_chosen,
            experts_TK.data_ptr(),
            weights_TK.data_ptr(),
        )
        return experts_TK, weights_TK

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]. The sum over a token's experts is in fp32 and in a fixed order."""
        experts_TK, weights_TK = self.route(x_TC)
        self.traffic.add(experts_TK)
        y_TKC = self.experts.forward(x_TC, experts_TK).view(*experts_TK.shape, -1)
        out_TC = (y_TKC * weights_TK.unsqueeze(-1)).sum(dim=1)
        return out_TC.to(x_TC.dtype)
