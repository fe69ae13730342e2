"""The tensors that the pickle inside a ``.pth`` file describes."""

from typing import Final

from ...errors import CheckpointError
from .pickle_machine import PickledTensor, PickleMachine, kind_of
from .stored_tensor import some

MAX_PICKLE_BYTES: Final = 16 << 20


def read_tensor_pickle(raw: bytes) -> dict[str, PickledTensor]:
    """The tensors of a pickled flat dictionary, by name, in its order.

    Raises:
        UnsafePickleError: it refers to a name or uses an opcode that tensors do not need.
        CheckpointError: it is damaged, too large, or not a flat dictionary of tensors.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"The pickle has {len(raw)} bytes and at most {MAX_PICKLE_BYTES} are read; "
            "it is not a plain dictionary of tensors."
        )
    found = PickleMachine(raw).run()
    if not isinstance(found, dict):
        raise CheckpointError(
            f"The pickle holds a {kind_of(found)} and not a dictionary of tensors by name."
        )
    strangers = [name for name, value in found.items() if not isinstance(value, PickledTensor)]
    if strangers:
        raise CheckpointError(
            f"The pickle holds {len(strangers)} values that are not tensors "
            f"({some(strangers)}: {kind_of(found[strangers[0]])}); only a flat dictionary is read."
        )
    return found
