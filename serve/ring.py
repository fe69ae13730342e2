"""How the actors of one pipeline find their neighbours in its ring."""

from typing import Final

from ..cluster.deployment.assignment import LinkSetup
from ..cluster.links.dial import dial as connect
from ..cluster.links.link import TcpLink
from ..cluster.links.listener import LinkListener

LINK_TIMEOUT_S: Final = 60.0
"""For a neighbour in the ring to dial or to answer; all are told to at the same time."""


def listen(links: LinkSetup) -> LinkListener:
    """Open the link on which the neighbour before this one, or the stage of a helper, arrives."""
    return LinkListener(
        host=links.listen_host,
        secret=links.secret,
        deployment=links.ring,
        epoch=links.epoch,
    )


def dial(links: LinkSetup, address: str) -> TcpLink:
    """The link to a member of the same ring."""
    return connect(
        address,
        secret=links.secret,
        deployment=links.ring,
        epoch=links.epoch,
        timeout_s=LINK_TIMEOUT_S,
    )


def join_ring(links: LinkSetup, listener: LinkListener, downstream: str) -> tuple[TcpLink, TcpLink]:
    """The links from the neighbour before and to the one after.

    Everybody dials first: a listener answers while nobody accepts yet.
    """
    next_link = dial(links, downstream)
    try:
        return listener.accept(LINK_TIMEOUT_S), next_link
    except BaseException:
        next_link.close()
        raise
