"""What a step costs: one pure function per term, bytes in and seconds out.

A roofline: a term takes as long as its bytes or its operations, whichever is longer. Decoding is
mostly bytes, of every *distinct* expert once; operations follow the experts that a token really
uses. Tokens of a step hit experts independently of each other (measured on Mixtral: within 1 %).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import Footprint, footprint
from ..machines import ComputeDtype, Device, Inventory, Link

ATTENTION_HEAD_DIM = 128
"""Of the heads that the rate of attention is told for. What a score takes beside its two products
does not depend on it, so that the rate is lower for smaller heads."""
TOKEN_ID_BYTES = 256
"""What returns from the last stage for one token: its id in a small frame."""
HIDDEN_ITEM_BYTES = 2
ASSUMED_RTT_S = 0.3e-3
ASSUMED_GBPS = 0.117
"""1 GbE with Linux sockets; what two nodes are taken to have when nobody measured."""
LOCAL_RTT_S = 0.1e-3
LOCAL_GBPS = 2.0
"""Between two devices of one node: loopback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """A device at one dtype."""

    read_gbps: float
    gemm_gflops: float = float("inf")
    kv_read_gbps: float = float("inf")
    """Of keys and values, as decoding meets them."""
    score_gflops: float = float("inf")
    """Of the two products of attention, which are in bf16 whatever the weights."""
    score_s: float = 0.0
    """What attention takes for every score of a query and a key beside these: the softmax."""
    layer_overhead_s: float = 0.0
    """What a layer takes in every step whatever its size."""
    helper_overhead_s: float = 0.0
    """What a layer of it takes longer once helpers compute some of its experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """A model in bytes at one dtype: what a step reads of every part."""

    attention_bytes: tuple[int, ...]
    """Of each layer, everything but its experts; of a dense model the whole layer."""
    expert_bytes: tuple[int, ...]
    """Of each layer, one expert; 0 of a dense model."""
    output_bytes: int
    num_experts: int
    experts_per_token: int
    kv_bytes_per_token: int
    num_heads: int
    """Of queries: each has a score of its own with every key."""
    head_dim: int
    hidden_bytes: int
    """One token's hidden state on a link."""
    embedding_bytes: int
    """One row of the embeddings."""
    weight_bits: float
    """Of one weight, for operations: two per weight and token."""
    window: int | None

    def of_layers(self, cost: Callable[[int], float]) -> list[float]:
        """What each layer costs, computed once for all layers that weigh the same."""
        weights = list(zip(self.attention_bytes, self.expert_bytes, strict=True))
        first_of = {weight: weights.index(weight) for weight in set(weights)}
        known = {weight: cost(layer) for weight, layer in first_of.items()}
        return [known[weight] for weight in weights]


def model_cost(
    config: ModelConfig,
    index: TensorIndex,
    dtype: ComputeDtype,
    *,
    whole: Footprint | None = None,
) -> ModelCost:
    """Weigh the parts of a model as `footprint` weighs the whole, if that is not given."""
    whole = whole or footprint(config, index, dtype)
    experts = [0] * config.n_layers
    entries = {entry.name: entry for entry in index if ".experts." in entry.name}
    if entries and config.num_experts:
        of_experts = footprint(config, TensorIndex(entries), dtype).layer_bytes
        experts = [each // config.num_experts for each in of_experts]
    attention = tuple(
        layer - config.num_experts * expert
        for layer, expert in zip(whole.layer_bytes, experts, strict=True)
    )
    return ModelCost(
        attention_bytes=attention,
        expert_bytes=tuple(experts),
        output_bytes=whole.output_bytes,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        kv_bytes_per_token=whole.kv_bytes_per_token,
        num_heads=config.n_heads,
        head_dim=config.head_dim,
        hidden_bytes=config.dim * HIDDEN_ITEM_BYTES,
        embedding_bytes=max(1, whole.embeddings_bytes // config.vocab_size),
        weight_bits=_bits_per_weight(whole, index),
        window=config.sliding_window,
    )


def _bits_per_weight(whole: Footprint, index: TensorIndex) -> float:
    num_weights = 0
    for entry in index:
        count = 1
        for extent in entry.shape:
            count *= extent
        num_weights += count
    return 8 * whole.weights_bytes / num_weights


def device_speed(device: Device, dtype: ComputeDtype) -> Speed | None:
    """How fast a device reads and multiplies at a dtype; None where nobody knows."""
    read = dict(device.dtype_read_gbps).get(dtype, device.read_gbps)
    if read is None:
        return None
    gflops = dict(device.dtype_gemm_gflops).get(dtype, device.gemm_gflops)
    products = float("inf") if device.gemm_gflops is None else device.gemm_gflops
    attention = products if device.attention_gflops is None else device.attention_gflops
    slower_s = (1 / attention - 1 / products) / 1e9
    return Speed(
        read_gbps=read,
        gemm_gflops=float("inf") if gflops is None else gflops,
        kv_read_gbps=device.kv_read_gbps or device.read_gbps or read,
        score_gflops=products,
        score_s=max(0.0, slower_s * _score_flops(ATTENTION_HEAD_DIM)),
        layer_overhead_s=device.layer_overhead_s,
        helper_overhead_s=device.helper_overhead_s,
    )


def roofline_s(num_bytes: float, num_flops: float, speed: Speed) -> float:
    """The longer of reading and computing."""
    return max(num_bytes / (speed.read_gbps * 1e9), num_flops / (speed.gemm_gflops * 1e9))


def distinct_experts(
    num_experts: int, per_token: int, tokens: int, popularity: Sequence[float] | None = None
) -> float:
    """Expected number of experts that at least one of `tokens` tokens needs.

    `popularity` is the probability that a token needs each expert, `per_token` in sum; without it
    all are alike. Mixtral, uniform: 2, 3.5, 5.47, 7.2, 7.92 for 1, 2, 4, 8, 16 tokens.
    """
    if popularity is None:
        return num_experts * (1 - (1 - per_token / num_experts) ** tokens) if num_experts else 0.0
    return sum(1 - (1 - share) ** tokens for share in popularity)


def kv_touch_bytes(model: ModelCost, *, tokens: int, context_tokens: float) -> float:
    """Keys and values that one layer reads to decode `tokens` sequences."""
    return tokens * _seen(model, context_tokens) * model.kv_bytes_per_token


def decode_scores_s(model: ModelCost, speed: Speed, *, tokens: int, context_tokens: float) -> float:
    """One layer's attention in a decode step: every sequence reads keys and values of its own."""
    return _scores_s(model, speed, contexts=tokens, tokens=tokens, context_tokens=context_tokens)


def prompt_scores_s(model: ModelCost, speed: Speed, *, tokens: int, context_tokens: float) -> float:
    """One layer's attention in a chunk of a prompt, of which a token sees so many keys on average:
    all read the same ones."""
    return _scores_s(model, speed, contexts=1, tokens=tokens, context_tokens=context_tokens)


def _scores_s(
    model: ModelCost, speed: Speed, *, contexts: int, tokens: int, context_tokens: float
) -> float:
    """The longer of reading so many contexts and scoring one for each token."""
    touched = kv_touch_bytes(model, tokens=contexts, context_tokens=context_tokens)
    scores = tokens * _seen(model, context_tokens) * model.num_heads
    products_s = _score_flops(model.head_dim) / (speed.score_gflops * 1e9)
    return max(touched / (speed.kv_read_gbps * 1e9), scores * (products_s + speed.score_s))


def _seen(model: ModelCost, context_tokens: float) -> float:
    return context_tokens if model.window is None else min(context_tokens, model.window)


def _score_flops(head_dim: int) -> int:
    """Of one score: a query times a key, and what it makes of a value."""
    return 4 * head_dim


def shared_s(model: ModelCost, layer: int, speed: Speed, *, tokens: int) -> float:
    """What all tokens of a step go through in one layer, scores and experts aside, and the layer's
    overhead."""
    weights = model.attention_bytes[layer]
    return speed.layer_overhead_s + roofline_s(weights, _flops(model, weights) * tokens, speed)


def attention_s(
    model: ModelCost,
    layer: int,
    speed: Speed,
    *,
    tokens: int,
    context_tokens: float,
    prompt_tokens: int = 0,
    prompt_context_tokens: float = 0.0,
) -> float:
    """One layer of a step without its experts: `tokens` sequences that are decoded, each with keys
    of so many tokens, and tokens of prompts, each of which sees so many on average."""
    seen_s = decode_scores_s(model, speed, tokens=tokens, context_tokens=context_tokens)
    if prompt_tokens:
        seen_s += prompt_scores_s(
            model, speed, tokens=prompt_tokens, context_tokens=prompt_context_tokens
        )
    return shared_s(model, layer, speed, tokens=tokens + prompt_tokens) + seen_s


def experts_s(
    model: ModelCost,
    layer: int,
    speed: Speed,
    *,
    tokens: int,
    popularity: Sequence[float] | None = None,
) -> float:
    """The experts of one layer: bytes of the distinct ones, operations of the chosen ones."""
    if not model.num_experts:
        return 0.0
    distinct = distinct_experts(model.num_experts, model.experts_per_token, tokens, popularity)
    flops = expert_flops(model, layer) * model.experts_per_token * tokens
    return roofline_s(distinct * model.expert_bytes[layer], flops, speed)


def embeddings_s(model: ModelCost, speed: Speed, *, tokens: int) -> float:
    """A row per token."""
    return roofline_s(model.embedding_bytes * tokens, 0, speed)


def output_s(model: ModelCost, speed: Speed, *, tokens: int) -> float:
    """The output head, of which every step reads all."""
    return roofline_s(model.output_bytes, _flops(model, model.output_bytes) * tokens, speed)


def layer_s(
    model: ModelCost,
    layer: int,
    speed: Speed,
    *,
    tokens: int,
    context_tokens: float,
    prompt_tokens: int = 0,
    prompt_context_tokens: float = 0.0,
) -> float:
    """One layer of a step, which has what `attention_s` says."""
    attention = attention_s(
        model,
        layer,
        speed,
        tokens=tokens,
        context_tokens=context_tokens,
        prompt_tokens=prompt_tokens,
        prompt_context_tokens=prompt_context_tokens,
    )
    return attention + experts_s(model, layer, speed, tokens=tokens + prompt_tokens)


def prefill_layer_s(
    model: ModelCost, layer: int, speed: Speed, *, tokens: int, context_tokens: float
) -> float:
    """One layer over a chunk of a prompt by itself, of which a token sees so many keys on
    average."""
    return layer_s(
        model,
        layer,
        speed,
        tokens=0,
        context_tokens=0,
        prompt_tokens=tokens,
        prompt_context_tokens=context_tokens,
    )


def chunk_context(position: int, tokens: int) -> float:
    """Keys that a token of a chunk sees on average, itself among them."""
    return position + (tokens + 1) / 2


def transfer_s(num_bytes: float, link: Link) -> float:
    """How long a message occupies a link."""
    return num_bytes / (link.gbps * 1e9)


def hop_s(num_bytes: float, link: Link) -> float:
    """From a stage that has its result to the next one that can begin."""
    return link.overhead_s + link.rtt_s / 2 + transfer_s(num_bytes, link)


def assumed_link(source: str, target: str) -> Link:
    """What is taken to lie between two nodes (or the devices of one) that nobody measured."""
    if source == target:
        return Link(source=source, target=target, rtt_s=LOCAL_RTT_S, gbps=LOCAL_GBPS)
    return Link(source=source, target=target, rtt_s=ASSUMED_RTT_S, gbps=ASSUMED_GBPS)


def known_links(inventory: Inventory) -> dict[tuple[str, str], Link]:
    """By source and target; a link measured one way alone counts for both."""
    found = {(link.target, link.source): link for link in inventory.links}
    return found | {(link.source, link.target): link for link in inventory.links}


def expert_flops(model: ModelCost, layer: int) -> float:
    """Operations of one token in one expert."""
    return _flops(model, model.expert_bytes[layer])


def _flops(model: ModelCost, num_bytes: float) -> float:
    """Operations of one token over weights of so many bytes."""
    return 2 * num_bytes * 8 / model.weight_bits
