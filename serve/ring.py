"""How the actors of one pipeline find their neighbours in its ring."""

from typing import Final

from ..cluster.deployment.assignment import LinkSetup
from ..cluster.links import link

LINK_TIMEOUT_S: Final = 60.0
"""For a neighbour in the ring to dial or to answer; all are told to at the same time."""


def listen(links: LinkSetup) -> link.LinkListener:
    """Open the link on which the neighbour before this one, or the stage of a helper, arrives."""
    return link.LinkListener(
        host=links.listen_host,
        secret=links.secret,
        deployment=links.ring,
        epoch=links.epoch,
    )


def dial(links: LinkSetup, address: str) -> link.TcpLink:
    """The link to a member of the same ring."""
    return link.dial(
        address,
        secret=links.secret,
        deployment=links.ring,
        epoch=links.epoch,
        timeout_s=LINK_TIMEOUT_S,
    )


def join_ring(
    links: LinkSetup, listener: link.LinkListener, downstream: str
) -> tuple[link.TcpLink, link.TcpLink]:
    """The links from the neighbour before and to the one after.

    Everybody dials first: a listener answers while nobody accepts yet.
    """
    next_link = dial(links, downstream)
    try:
        return listener.accept(LINK_TIMEOUT_S), next_link
    except BaseException:
        next_link.close()
        raise
