"""The machine as the planner's gauge sees it between the rounds of a benchmark."""

import time
from dataclasses import dataclass, replace

from magnetar.cluster.machines import ComputeDtype, Node
from magnetar.serve.gauge import SmallLayers, WeightReader, kv_read_gbps
from magnetar.serve.small_attention import SmallAttention
from magnetar.serve.small_model import small_layer_bytes

PLAIN_VALUES = 1 << 25
"""Of fp32; larger than the caches."""
PLAIN_RUNS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a machine was like for half a second."""

    node: Node
    """With what layers take now."""
    gauge_gbps: float
    both_gbps: float
    """What two such nodes read each while both do, with twice the threads."""
    plain_gbps: float
    """Of a sum, which nobody's kernels have a part in."""


class RoundsGauge:
    """Measures again what of a node depends on its memory: a tenth of what the whole gauge takes,
    for weights and small models stay."""

    def __init__(self, node: Node, dtype: ComputeDtype) -> None:
        """`node` is this machine, measured; its processor is."""
        import torch

        self._node, self._dtype = node, dtype
        self._weights = WeightReader(dtype, "cpu", node.num_cpus)
        self._layers = SmallLayers(dtype, "cpu", self._weights)
        self._attention = SmallAttention("cpu", node.num_cpus)
        self._values = torch.ones(PLAIN_VALUES)

    def measure(self) -> Moment:
        """Now; blocks for about a second."""
        threads, device = self._node.num_cpus, self._node.devices[0]
        gbps, layer_s = self._weights.gbps(threads), self._layers.layer_s(threads)
        rest_s = max(0.0, layer_s - small_layer_bytes(self._dtype) / gbps / 1e9)
        now = replace(
            device,
            read_gbps=gbps,
            dtype_read_gbps=(),
            kv_read_gbps=kv_read_gbps(self._attention, "cpu", threads),
            layer_overhead_s=rest_s,
        )
        devices = (now, *self._node.devices[1:])
        return Moment(
            node=replace(self._node, devices=devices),
            gauge_gbps=gbps,
            both_gbps=self._weights.gbps(2 * threads) / 2,
            plain_gbps=self._plain_gbps(),
        )

    def _plain_gbps(self) -> float:
        best_s = float("inf")
        for _ in range(PLAIN_RUNS):
            began = time.perf_counter()
            self._values.sum()
            best_s = min(best_s, time.perf_counter() - began)
        return self._values.nbytes / best_s / 1e9
