"""A model at every dtype that it is asked for at, weighed once for a whole search."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import Footprint, footprint
from ..machines import ComputeDtype
from .cost import ModelCost, model_cost


class WeighedModel:
    """What a model weighs and costs, by dtype, and what was worked out from that."""

    def __init__(self, config: ModelConfig, index: TensorIndex) -> None:
        self.config, self.index = config, index
        self.footprint = cache(self._footprint)
        self.cost = cache(self._cost)
        self.known: dict[object, Any] = {}
        """Seconds of layers and of ways to spread experts, by all that they depend on."""

    def _footprint(self, dtype: ComputeDtype) -> Footprint:
        return footprint(self.config, self.index, dtype)

    def _cost(self, dtype: ComputeDtype) -> ModelCost:
        return model_cost(self.config, self.index, dtype, whole=self.footprint(dtype))
