"""The sparse feed-forward layer: every token goes to its `num_experts_per_tok` best experts.

Shapes: T tokens, C model width, E experts, K experts per token, A = T * K assignments
(token-major), I hidden width, F = 2 * I.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ...fetcher.config import ModelConfig
from .feed_forward import gated, swiglu

ExpertsKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x_TC, experts_TK, w13_EFC, w2_ECI) -> y_AC``: outputs of the chosen experts, unweighted."""


def loop_experts(
    x_TC: torch.Tensor, experts_TK: torch.Tensor, w13_EFC: torch.Tensor, w2_ECI: torch.Tensor
) -> torch.Tensor:
    """Assignments sorted by expert, one GEMM per expert that has any; waits for the device.

    The best there is on a CPU: gathering weights per token took 3 to 11 times as long.
    """
    num_tokens, num_chosen = experts_TK.shape
    if num_tokens == 1:
        chosen = experts_TK[0].tolist()
        return torch.cat([swiglu(x_TC, w13_EFC[e], w2_ECI[e]) for e in chosen])
    experts_A = experts_TK.flatten()
    order_A = experts_A.argsort(stable=True)
    x_AC = x_TC.index_select(0, order_A // num_chosen)
    counts = torch.bincount(experts_A, minlength=w2_ECI.shape[0]).tolist()
    y_AC = torch.cat(
        [
            swiglu(x_eC, w13_EFC[e], w2_ECI[e])
            for e, x_eC in enumerate(torch.split(x_AC, counts))
            if counts[e]
        ]
    )
    return torch.empty_like(y_AC).index_copy_(0, order_A, y_AC)


def grouped_mm_experts(
    x_TC: torch.Tensor, experts_TK: torch.Tensor, w13_EFC: torch.Tensor, w2_ECI: torch.Tensor
) -> torch.Tensor:
    """Assignments sorted by expert, all experts in one kernel; never waits for the device.

    Needs rows of a multiple of 16 bytes, and on CUDA bf16 and compute capability 8.0 or later.
    """
    experts_A = experts_TK.flatten()
    sorted_A, order_A = experts_A.sort(stable=True)
    # Ends of the groups, without bincount: that would need its size on the host.
    every_expert_E = torch.arange(w2_ECI.shape[0], device=x_TC.device)
    ends_E = torch.searchsorted(sorted_A, every_expert_E, right=True).to(torch.int32)
    x_AC = x_TC.index_select(0, order_A // experts_TK.shape[1])
    h_AF = F.grouped_mm(x_AC, w13_EFC.transpose(-2, -1), offs=ends_E)
    y_AC = F.grouped_mm(gated(h_AF), w2_ECI.transpose(-2, -1), offs=ends_E)
    return torch.empty_like(y_AC).index_copy_(0, order_A, y_AC)


EXPERTS_KERNELS: Mapping[str, ExpertsKernel] = {
    "loop": loop_experts,
    "grouped_mm": grouped_mm_experts,
}


def default_experts_kernel(*, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel that suits the device."""
    return "grouped_mm" if device.type == "cuda" and dtype is torch.bfloat16 else "loop"


class MoeLayer:
    """The router `gate` and the experts, stacked: `w1` above `w3`, and `w2`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        gate: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        kernel: str | None = None,
    ) -> None:
        self.gate = gate
        """[E, C]"""
        self.w13 = w13
        """[E, 2 * I, C]"""
        self.w2 = w2
        """[E, C, I]"""
        self.num_experts_per_tok = config.num_experts_per_tok
        name = kernel or default_experts_kernel(dtype=w2.dtype, device=w2.device)
        self._run_experts = EXPERTS_KERNELS[name]

    def route(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of every token [T, K] and their weights [T, K] in fp32, which sum to 1.

        The softmax is over the chosen logits only: the same as a softmax over all of them,
        renormalised.
        """
        logits_TK, experts_TK = F.linear(x_TC, self.gate).topk(self.num_experts_per_tok, dim=-1)
        return experts_TK, logits_TK.softmax(dim=-1, dtype=torch.float32)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]. The sum over a token's experts is in fp32 and in a fixed order."""
        experts_TK, weights_TK = self.route(x_TC)
        y_AC = self._run_experts(x_TC, experts_TK, self.w13, self.w2)
        y_TKC = y_AC.view(*experts_TK.shape, -1)
        out_TC = (y_TKC * weights_TK.unsqueeze(-1)).sum(dim=1)
        return out_TC.to(x_TC.dtype)
