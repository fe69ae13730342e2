"""How the two ends of a link prove to each other that they belong to one pipeline.

The listener sends a challenge; the dialler answers with a proof, and gets a verdict with a proof
back. A proof is an HMAC-SHA256, under the deployment's secret, over the role of who proves, the
deployment, the epoch and both sides' fresh random numbers; so it cannot be replayed, reflected, or
used for another deployment or incarnation. The frames that follow are not signed: whoever can
change packets on the network between the nodes must be kept out by other means.
"""

import hashlib
import hmac
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Final, Literal

from ...errors import StageLostError

HANDSHAKE_S: Final = 5.0
"""For all of it; a peer that is slower is no neighbour."""

_MAGIC = b"MGNH"
_VERSION = 2
_CHALLENGE = struct.Struct("<4sB32s")
"""Magic, version, the listener's nonce."""
_ANSWER = struct.Struct("<4sBQ32s32s")
"""Magic, version, the dialler's epoch, its nonce, its proof."""
_VERDICT = struct.Struct("<BQ32s")
"""Whether the epoch is right, the listener's epoch, its proof."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """What every member of one incarnation of a pipeline knows."""

    secret: bytes
    deployment: str
    epoch: int


def welcome(sock: socket.socket, us: Membership, *, deadline: float) -> None:
    """The listener's side; `deadline` is a reading of ``time.monotonic``.

    Raises:
        StageLostError: the peer is no member; the message continues a sentence about it.
        OSError: the connection broke.
    """
    nonce = os.urandom(32)
    sock.sendall(_CHALLENGE.pack(_MAGIC, _VERSION, nonce))
    magic, version, epoch, peer_nonce, proof = _ANSWER.unpack(_read(sock, _ANSWER.size, deadline))
    _check_version(magic, version)
    transcript = nonce + peer_nonce
    if not hmac.compare_digest(proof, _proof(us, "dial", epoch, transcript)):
        raise StageLostError("it does not know the secret of this deployment")
    # It is one of us: it may know whether it is late, or early.
    is_current = epoch == us.epoch
    own_proof = _proof(us, "accept", us.epoch, transcript + bytes([is_current]))
    sock.sendall(_VERDICT.pack(is_current, us.epoch, own_proof))
    if not is_current:
        raise StageLostError(f"it is of epoch {epoch}; this is epoch {us.epoch}")


def introduce(sock: socket.socket, us: Membership, *, deadline: float) -> None:
    """The dialler's side; as `welcome`."""
    magic, version, peer_nonce = _CHALLENGE.unpack(_read(sock, _CHALLENGE.size, deadline))
    _check_version(magic, version)
    nonce = os.urandom(32)
    transcript = peer_nonce + nonce
    proof = _proof(us, "dial", us.epoch, transcript)
    sock.sendall(_ANSWER.pack(_MAGIC, _VERSION, us.epoch, nonce, proof))
    is_current, epoch, proof = _VERDICT.unpack(_read(sock, _VERDICT.size, deadline))
    expected = _proof(us, "accept", epoch, transcript + bytes([is_current]))
    if not hmac.compare_digest(proof, expected):
        raise StageLostError("it does not know the secret of this deployment")
    if not is_current or epoch != us.epoch:
        raise StageLostError(f"it is of epoch {epoch}; this is epoch {us.epoch}")


def _check_version(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise StageLostError("it is no member of a pipeline")
    if version != _VERSION:
        raise StageLostError(
            f"it speaks version {version} of the protocol, this is {_VERSION}; run the same "
            "Magnetar on all nodes"
        )


def _proof(us: Membership, role: Literal["dial", "accept"], epoch: int, transcript: bytes) -> bytes:
    deployment = us.deployment.encode()
    message = b"".join(
        [
            f"magnetar link {_VERSION} {role} {epoch} {len(deployment)} ".encode(),
            deployment,
            transcript,
        ]
    )
    return hmac.digest(us.secret, message, hashlib.sha256)


def _read(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Exactly so many bytes; a peer that sends one at a time does not get more time for it."""
    received = b""
    while len(received) < num_bytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise StageLostError("it did not finish the handshake in time")
        sock.settimeout(left_s)
        try:
            part = sock.recv(num_bytes - len(received))
        except TimeoutError:
            continue
        if not part:
            raise StageLostError("it closed the connection")
        received += part
    return received
