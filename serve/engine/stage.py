"""One stage of the pipeline: executes step plans and decides nothing.

Shapes: T tokens of the step, S tokens whose successor is sampled, D model width (`dim`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from ...cluster.machines import ComputeDtype
from ...errors import UsageError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorSource
from ..model.batch import lay_out, rotations_of
from ..model.kv_cache import KVCache
from ..model.loader import COMPUTE_DTYPES, LayerExperts, load_transformer
from ..model.moe import MoeLayer
from ..model.spread import RemoteExperts, SpreadExperts
from ..model.transformer import Transformer
from .readout import Readout
from .step import StepPlan, StepResult


class Stage:
    """Consecutive layers with their KV cache, and the block table of every live request.

    Not thread-safe: one thread calls `step`. Steps must come in the order of the engine.
    """

    def __init__(
        self,
        transformer: Transformer,
        *,
        caches: Mapping[int, KVCache],
        dtype: torch.dtype,
        device: torch.device,
        loaded_bytes: int,
    ) -> None:
        self.hidden_dtype = dtype
        """Dtype of the hidden states that travel between stages."""
        self.loaded_bytes = loaded_bytes
        """Memory that the weights occupy."""
        self._transformer = transformer
        self._caches = caches
        self._device = device
        self._rotations = rotations_of(transformer.config, device)
        self._tables: dict[int, list[int]] = {}
        self._readout = None if transformer.output is None else Readout(transformer)

    @classmethod
    def load(
        cls,
        *,
        config: ModelConfig,
        source: TensorSource,
        first_layer: int,
        end_layer: int,
        has_embeddings: bool,
        has_output: bool,
        dtype: str,
        device: str,
        num_kv_blocks: int,
        batch_invariant: bool = False,
        held_experts: LayerExperts | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Stage:
        """Read the weights of the layers ``first_layer .. end_layer`` and make room for their KV.

        `dtype` is one of `COMPUTE_DTYPES`, `device` as torch names it. With `batch_invariant`
        what a request gets does not depend, to the bit, on other requests, chunks or stages.
        `held_experts` has, by layer, the experts to hold here where helpers hold others; such a
        stage must `join_helpers` before its first step. Blocks on the disk. `on_layer` hears the
        bytes loaded so far, as they are held; at the end they are `loaded_bytes`.

        Raises:
            CheckpointError: a tensor is missing, surplus, of another shape, or beyond fp16.
            UsageError: there is no such compute dtype.
            PreflightError: this machine cannot compute so that it is `batch_invariant`.
        """
        if dtype not in COMPUTE_DTYPES:
            raise UsageError(f"no dtype {dtype!r}; choose one of {', '.join(COMPUTE_DTYPES)}")
        torch_dtype, torch_device = COMPUTE_DTYPES[dtype], torch.device(device)
        transformer, loaded_bytes = load_transformer(
            config,
            source,
            first_layer=first_layer,
            end_layer=end_layer,
            has_embeddings=has_embeddings,
            has_output=has_output,
            dtype=cast(ComputeDtype, dtype),
            device=torch_device,
            batch_invariant=batch_invariant,
            held_experts=held_experts,
            on_layer=on_layer,
        )
        caches = {
            layer_id: KVCache(
                config, num_blocks=num_kv_blocks, dtype=torch_dtype, device=torch_device
            )
            for layer_id in transformer.layers
        }
        return cls(
            transformer,
            caches=caches,
            dtype=torch_dtype,
            device=torch_device,
            loaded_bytes=loaded_bytes,
        )

    def join_helpers(self, helpers: Sequence[tuple[RemoteExperts, LayerExperts]]) -> None:
        """Let helpers compute the experts that they hold; ValueError where one is on no host."""
        for layer_id, layer in self._transformer.layers.items():
            moe = layer.feed_forward
            if isinstance(moe, MoeLayer) and isinstance(moe.experts, SpreadExperts):
                moe.experts.join([(helper, held.get(layer_id, ())) for helper, held in helpers])

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for since the start; from any thread."""
        layers = self._transformer.layers.items()
        moes = [(n, layer.feed_forward) for n, layer in layers]
        return {n: moe.traffic.totals() for n, moe in moes if isinstance(moe, MoeLayer)}

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        """Compute the plan's rows: hidden states [T, D] on the CPU, or the last stage's samples.

        `hidden_TD` comes from the stage before, and is None exactly on the first; it is not
        modified. Block tables change first: released requests are forgotten, then each row's new
        blocks are appended. Keys and values of the rows are written into their blocks.

        Raises:
            ValueError: hidden states that do not fit the plan, or a row without room in its
                blocks: a defect of the engine, not of the request.
            StageLostError: a helper is gone.
        """
        with torch.inference_mode():
            computed_TD = self._compute(plan, hidden_TD)
            if self._readout is None:
                return computed_TD.cpu()
            samples = self._readout.read(plan, computed_TD)
        return StepResult(step_id=plan.step_id, samples=samples)

    def forward(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """`step` without reading out: hidden states [T, D], or logits [S, V] on the last stage.

        Both stay on the stage's device, in its dtype.
        """
        with torch.inference_mode():
            return self._forward(plan, hidden_TD)

    def _forward(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        computed_TD = self._compute(plan, hidden_TD)
        return computed_TD if self._readout is None else self._readout.logits(plan, computed_TD)

    def _compute(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        self._update_tables(plan)
        transformer = self._transformer
        if (hidden_TD is None) != (transformer.tok_embeddings is not None):
            raise ValueError("hidden states are for every stage but the first, and only for those")
        if hidden_TD is None:
            token_ids = [token for row in plan.rows for token in row.token_ids]
            tokens_T = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            hidden_TD = transformer.embed(tokens_T)
        elif len(hidden_TD) != plan.num_tokens:
            raise ValueError(
                f"step {plan.step_id} has {plan.num_tokens} tokens, but {len(hidden_TD)} came"
            )
        hidden_TD = hidden_TD.to(self._device, self.hidden_dtype)
        if plan.rows:  # else it only releases
            batch = lay_out(
                plan.rows,
                self._tables,
                config=transformer.config,
                dtype=self.hidden_dtype,
                device=self._device,
                rotations=self._rotations,
            )
            hidden_TD = transformer.forward(hidden_TD, batch, self._caches)
        return hidden_TD

    def _update_tables(self, plan: StepPlan) -> None:
        for request_id in plan.released:
            self._tables.pop(request_id, None)
        for row in plan.rows:
            self._tables.setdefault(row.request_id, []).extend(row.new_block_ids)
