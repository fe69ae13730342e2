"""The part of a stage that lies on another node: some experts of some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from ...cluster.machines import ComputeDtype
from ...errors import UsageError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorSource
from ..model.loader import COMPUTE_DTYPES, LayerExperts, load_experts
from ..model.spread import HeldExperts


class Helper:
    """Experts by layer; it keeps no state between calls."""

    def __init__(
        self, layers: Mapping[int, HeldExperts], *, device: torch.device, loaded_bytes: int
    ) -> None:
        self.loaded_bytes = loaded_bytes
        """Memory that the weights occupy."""
        self._layers = layers
        self._device = device

    @classmethod
    def load(
        cls,
        *,
        config: ModelConfig,
        source: TensorSource,
        experts: LayerExperts,
        dtype: str,
        device: str,
        batch_invariant: bool = False,
        on_layer: Callable[[int], None] | None = None,
    ) -> Helper:
        """Read the weights of the experts with these ids; as `Stage.load` in all else."""
        if dtype not in COMPUTE_DTYPES:
            raise UsageError(f"no dtype {dtype!r}; choose one of {', '.join(COMPUTE_DTYPES)}")
        layers, loaded_bytes = load_experts(
            config,
            source,
            experts,
            dtype=cast(ComputeDtype, dtype),
            device=torch.device(device),
            batch_invariant=batch_invariant,
            on_layer=on_layer,
        )
        return cls(layers, device=torch.device(device), loaded_bytes=loaded_bytes)

    def outputs(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> torch.Tensor:
        """What these experts of a layer make of these rows of `x_RC`: [A, C] on the CPU.

        R rows, C model width, A outputs. KeyError for a layer or an expert that is not held.
        """
        with torch.inference_mode():
            x_RC = x_RC.to(self._device)
            return self._layers[layer_id].outputs(x_RC, rows_A, experts_A).cpu()
