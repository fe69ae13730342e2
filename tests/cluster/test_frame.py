"""What a frame on a link may say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.links.frame import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    Frame,
    pack_alive,
    pack_header,
    parse_header,
)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, 1, 1), torch.tensor(1.0), torch.zeros(2, dtype=torch.int64)]
)
def test_what_a_frame_cannot_say_is_not_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a link carries no tensor of"):
        pack_header(Frame(kind="step", epoch=0, step_id=0, tensor=tensor))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_no_bytes_crash_the_reader_of_headers(raw: bytes) -> None:
    for candidate in (raw, pack_alive(0)[:5] + raw[5:]):
        try:
            header = parse_header(candidate, epoch=0)
        except ValueError:
            continue
        assert header.body_bytes <= MAX_BODY_BYTES
