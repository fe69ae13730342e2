"""What a release consists of by its ``params.json`` alone, before a byte of it is here."""

import json
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig, ReleaseHints
from ..tensors import StoredDtype, TensorEntry, TensorIndex
from .canonical import expected_tensors
from .params import read_params


def described_release(
    params: Mapping[str, Any],
    dtype: StoredDtype,
    *,
    given: ReleaseHints,
    known: ReleaseHints,
) -> tuple[ModelConfig, TensorIndex]:
    """The model of these params, and its tensors with their sizes.

    Offsets count through the tensors in model order; nothing can be read by them.

    Raises:
        ReleaseError, UsageError: as `read_params`.
    """
    config = read_params(json.dumps(params).encode(), given=given, known=known)
    entries: dict[str, TensorEntry] = {}
    offset = 0
    for tensor in expected_tensors(config):
        entry = TensorEntry(
            name=tensor.name,
            source_name=tensor.name,
            file="",
            offset=offset,
            dtype=dtype,
            shape=tensor.shape,
        )
        entries[tensor.name] = entry
        offset += entry.num_bytes
    return config, TensorIndex(entries)
