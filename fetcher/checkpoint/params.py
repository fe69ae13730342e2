"""The facts of a model from the release's own description: ``params.json`` or ``config.json``.

Where both know a fact, what the user gave wins over the file, and the file over the catalogue.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from ...errors import ReleaseError, UsageError
from ..config import ModelConfig, ReleaseHints
from .fields import Fields
from .json_object import parse_json_object
from .stored_tensor import some

MAX_JSON_BYTES: Final = 1 << 20

_PARAMS_FIELDS: Final = frozenset(
    {
        *("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps"),
        *("vocab_size", "moe", "rope_theta", "sliding_window", "_sliding_window"),
        *("max_position_embeddings", "max_seq_len", "tied_embeddings", "max_batch_size"),
    }
)
_HARMLESS: Final[Mapping[str, object]] = {
    "model_type": "transformer",
    "causal": True,
    "use_biases": False,
    "bias": False,
    "qkv_bias": False,
}
"""Fields that say what is so anyway, with the value that says it."""
_DEFAULT_THETA: Final = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}
"""What transformers computes with when a config.json of that type does not say."""
_MISTRAL_DEFAULT_WINDOW: Final = 4096
_MISTRAL_DEFAULT_KV_HEADS: Final = 8

_ROPE_FIELDS: Final = frozenset({"rope_type", "type", "rope_theta"})
_HUGGINGFACE_MATHS: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}
"""Fields of a config.json that change what is computed, with the values that are computed here.
Absent or null is always fine."""

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def read_params(raw: bytes, *, given: ReleaseHints, known: ReleaseHints) -> ModelConfig:
    """The facts of a ``params.json`` in the form of Mistral's torrents.

    That beside the eight ``consolidated.0X.pt`` has the names of a config.json; it is read as one.

    Raises:
        ReleaseError: it is malformed, or asks for what is not computed here.
        UsageError: neither it nor the hints know the rope theta, the window or the context length;
            the message names every flag that is needed.
    """
    found = parse_json_object(raw, what="params.json", error=ReleaseError)
    if "hidden_size" in found:
        return _huggingface_names("params.json", _renamed(found, given), given=given, known=known)
    fields = Fields("params.json", found)
    strangers = [
        name
        for name, value in found.items()
        if name not in _PARAMS_FIELDS
        and value is not None
        and not (name in _HARMLESS and value == _HARMLESS[name])
    ]
    if strangers:
        raise ReleaseError(
            f"params.json has {len(strangers)} fields that are not known here "
            f"({some(strangers)}); the model may compute something else than Mistral's family does."
        )
    moe = Fields("params.json", fields.optional_object("moe") or {}, prefix="moe.")
    if more := [name for name in moe.found if name not in ("num_experts", "num_experts_per_tok")]:
        raise ReleaseError(f"params.json has moe fields that are not known here ({some(more)}).")

    theta = _first(given.rope_theta, fields.optional_number("rope_theta"), known.rope_theta)
    window = given.sliding_window or _params_window(fields) or known.sliding_window
    context = _context(
        given.max_context_tokens,
        fields.optional_count("max_position_embeddings"),
        fields.optional_count("max_seq_len"),
        known.max_context_tokens,
    )
    if theta is None or window is None or context is None:
        flags = [
            flag
            for flag, value in (
                ("--rope-theta", theta),
                ("--sliding-window", window),
                ("--max-context", context),
            )
            if value is None
        ]
        raise UsageError(
            f"params.json does not say everything about the model and the release is not in the "
            f"catalogue: give {', '.join(flags)} (Mixtral 8x7B: --rope-theta 1e6 --sliding-window "
            "none --max-context 32768)."
        )
    return _checked(
        "params.json",
        ModelConfig(
            dim=fields.count("dim"),
            n_layers=fields.count("n_layers"),
            head_dim=fields.count("head_dim"),
            hidden_dim=fields.count("hidden_dim"),
            n_heads=fields.count("n_heads"),
            n_kv_heads=fields.count("n_kv_heads"),
            norm_eps=fields.number("norm_eps"),
            vocab_size=fields.count("vocab_size"),
            rope_theta=theta,
            max_context_tokens=context,
            sliding_window=None if window == "none" else window,
            num_experts=moe.count("num_experts") if moe.found else 0,
            num_experts_per_tok=moe.count("num_experts_per_tok") if moe.found else 0,
            tie_embeddings=fields.flag("tied_embeddings"),
        ),
    )


def read_config(raw: bytes, *, given: ReleaseHints, known: ReleaseHints) -> ModelConfig:
    """The facts of a Hugging Face ``config.json`` of type mixtral, mistral or llama.

    Raises:
        ReleaseError: it is malformed, or asks for what is not computed here.
    """
    found = parse_json_object(raw, what="config.json", error=ReleaseError)
    return _huggingface_names("config.json", found, given=given, known=known)


def _renamed(found: dict[str, Any], given: ReleaseHints) -> dict[str, Any]:
    """What the params.json beside the eight-part weights says, as a config.json says it."""
    renamed = {"model_type": "mixtral" if "num_local_experts" in found else "mistral", **found}
    window = renamed.get("sliding_window")
    if isinstance(
        window, str
    ):  # so it is there, and transformers' converter turns it into a number
        renamed["sliding_window"] = int(window) if window.isdecimal() else None
    doubtful = renamed["model_type"] == "mixtral" and renamed.get("sliding_window") is not None
    if doubtful and given.sliding_window is None:
        _log.warning(
            "params.json gives a sliding window of %s tokens, which early descriptions of Mixtral "
            "did by mistake: --sliding-window none if this is Mixtral.",
            renamed["sliding_window"],
        )
    return renamed


def _huggingface_names(
    file: str, found: dict[str, Any], *, given: ReleaseHints, known: ReleaseHints
) -> ModelConfig:
    fields = Fields(file, found)
    model_type = found.get("model_type")
    if model_type not in ("mixtral", "mistral", "llama"):
        raise ReleaseError(
            f"{file} has model_type {some([str(model_type)])}; mixtral, mistral and llama are "
            "served."
        )
    _refuse_other_maths(fields)
    n_heads = fields.count("num_attention_heads")
    dim = fields.count("hidden_size")
    theta = _first(given.rope_theta, _config_theta(fields), known.rope_theta)
    window = given.sliding_window or _config_window(fields, model_type)
    context = _context(
        given.max_context_tokens,
        fields.optional_count("max_position_embeddings"),
        known.max_context_tokens,
    )
    if context is None:
        raise UsageError(f"{file} has no max_position_embeddings: give --max-context.")
    moe = model_type == "mixtral"
    return _checked(
        file,
        ModelConfig(
            dim=dim,
            n_layers=fields.count("num_hidden_layers"),
            head_dim=fields.optional_count("head_dim") or _even_share(file, dim, n_heads),
            hidden_dim=fields.count("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=_config_kv_heads(fields, model_type) or n_heads,
            norm_eps=fields.number("rms_norm_eps"),
            vocab_size=fields.count("vocab_size"),
            rope_theta=_DEFAULT_THETA[model_type] if theta is None else theta,
            max_context_tokens=context,
            sliding_window=None if window == "none" else window,
            num_experts=fields.count("num_local_experts") if moe else 0,
            num_experts_per_tok=fields.count("num_experts_per_tok") if moe else 0,
            tie_embeddings=fields.flag("tie_word_embeddings"),
        ),
    )


def _first(*values: _T | None) -> _T | None:
    return next((value for value in values if value is not None), None)


def _context(given: int | None, *published: int | None) -> int | None:
    own = _first(*published)
    if given is not None and own is not None and given > own:
        raise UsageError(
            f"a context of {given} tokens was asked for, the model was made for {own}; ask for "
            "that or less"
        )
    return _first(given, own)


def _params_window(fields: Fields) -> int | Literal["none"] | None:
    """The window of a params.json; None when it does not say."""
    for name in ("sliding_window", "_sliding_window"):
        if name not in fields.found:
            continue
        if isinstance(fields.found[name], list):
            raise ReleaseError(
                "params.json has a sliding window for every layer; only one for all is computed."
            )
        return fields.optional_count(name) or "none"
    return None


def _config_window(fields: Fields, model_type: str) -> int | Literal["none"]:
    """The window of a config.json, as transformers understands it."""
    if model_type == "llama":
        return "none"
    if model_type == "mistral" and "sliding_window" not in fields.found:
        return _MISTRAL_DEFAULT_WINDOW
    return fields.optional_count("sliding_window") or "none"


def _config_kv_heads(fields: Fields, model_type: str) -> int | None:
    """The KV heads, as transformers understands it; None: one for every head."""
    if model_type != "llama" and "num_key_value_heads" not in fields.found:
        return _MISTRAL_DEFAULT_KV_HEADS
    return fields.optional_count("num_key_value_heads")


def _config_theta(fields: Fields) -> float | None:
    """The rope theta, at the top level (transformers 4) or in `rope_parameters` (5)."""
    thetas = [fields.optional_number("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        rope = Fields(fields.file, fields.optional_object(name) or {}, prefix=f"{name}.")
        kind = rope.found.get("rope_type", rope.found.get("type", "default"))
        if kind != "default":
            raise ReleaseError(
                f"{fields.file} has rope scaling of type {some([str(kind)])}; only unscaled rotary "
                "positions are computed."
            )
        if more := [
            key
            for key, value in rope.found.items()
            if key not in _ROPE_FIELDS and value not in (None, 1.0)  # a factor of one is none
        ]:
            raise ReleaseError(
                f"{fields.file} has {name} that are not known here ({some(more)}); only unscaled "
                "rotary positions are computed."
            )
        thetas.append(rope.optional_number("rope_theta"))
    different = sorted({theta for theta in thetas if theta is not None})
    if len(different) > 1:
        raise ReleaseError(f"{fields.file} has more than one rope theta: {different}.")
    return different[0] if different else None


def _refuse_other_maths(fields: Fields) -> None:
    for name, allowed in _HUGGINGFACE_MATHS.items():
        value = fields.found.get(name)
        if value is not None and value not in allowed:
            raise ReleaseError(
                f"{fields.file} has {name} {some([json.dumps(value)])}, which is not computed here"
                + (f" (only {json.dumps(allowed[0])} is)." if allowed else ".")
            )


def _even_share(file: str, dim: int, n_heads: int) -> int:
    if dim % n_heads:
        raise ReleaseError(
            f"{file} has no head_dim, and {n_heads} heads do not share {dim} evenly."
        )
    return dim // n_heads


_LIMITS: Final = {
    "dim": 1 << 20,
    "n_layers": 1 << 10,
    "head_dim": 1 << 12,
    "hidden_dim": 1 << 22,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "vocab_size": 1 << 22,
    "max_context_tokens": 1 << 27,
    "num_experts": 1 << 12,
}


def _checked(file: str, config: ModelConfig) -> ModelConfig:
    """The config, if such a model can be.

    Raises:
        ReleaseError: it cannot; the message has every reason.
    """
    wrong = [
        f"{name} is {value}, more than {limit}"
        for name, limit in _LIMITS.items()
        if (value := getattr(config, name)) > limit
    ]
    if config.n_heads % config.n_kv_heads:
        wrong.append(f"{config.n_heads} heads do not share {config.n_kv_heads} KV heads evenly")
    if config.head_dim % 2:
        wrong.append(f"heads of {config.head_dim} have no rotary pairs")
    if config.num_experts_per_tok > config.num_experts:
        wrong.append(f"{config.num_experts_per_tok} experts per token of {config.num_experts}")
    if not 0 < config.norm_eps < 1:
        wrong.append(f"norm_eps is {config.norm_eps}")
    if not (0 < config.rope_theta < math.inf):
        wrong.append(f"rope_theta is {config.rope_theta}")
    if wrong:
        raise ReleaseError(f"{file} describes a model that cannot be: {'; '.join(wrong)}.")
    return config
