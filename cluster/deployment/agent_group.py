"""The agents of a deployment: one on every node, asked together."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ...errors import MagnetarError
from ...fetcher.checkpoint.release import ReleaseFacts, facts_from_json
from ...fetcher.ownership import Member
from ...fetcher.piece_map import ByteRange
from ...fetcher.progress import ProgressSink
from ...fetcher.torrent.lending import Lender
from ..inventory.link_cache import remembered_links
from ..machines import Inventory
from ..runtime.ray_calls import call, gather
from ..runtime.ray_runtime import RayNode
from ..spec import SourceSpec
from .agent import NodeAgent
from .arrivals import agent_name
from .foreman import Foreman
from .lenders import find_lenders
from .status import FetchedShare
from .turn import turn

START_TIMEOUT_S: Final = 120.0
CLOSE_TIMEOUT_S: Final = 20.0
TRAFFIC_TIMEOUT_S: Final = 10.0
LIVES_TIMEOUT_S: Final = 10.0
_METHODS_AT_ONCE: Final = 16
"""More than a node has stages that wait for their layers."""


class AgentGroup:
    """Starts the agents in its constructor; `stop` ends them."""

    def __init__(
        self,
        *,
        deployment: str,
        store: str,
        nodes: Sequence[RayNode],
        home: str,
        detached: bool,
        on_progress: ProgressSink,
        stop: threading.Event,
    ) -> None:
        self._deployment = deployment
        self._home = home
        self._addresses = tuple(node.address for node in nodes)
        self._info_hash: str | None = None
        self._lenders: Mapping[str, Lender] = {}
        self._on_progress = on_progress
        self._stop = stop
        self._foreman: Foreman | None = None
        self._cursors = {node.host: 0 for node in nodes}
        self._store = store
        self._lifetime = "detached" if detached else None
        # What an agent has to bring, for one that takes the place of a dead one.
        self._source: SourceSpec | None = None
        self._torrent: bytes | None = None
        self._shares: Mapping[str, tuple[ByteRange, ...] | None] = {}
        self._renewing = threading.Lock()
        self._agents: dict[str, Any] = {node.host: self._start(node) for node in nodes}

    def look(self, source: SourceSpec) -> tuple[ReleaseFacts, str | None]:
        """As `read_facts`, but from the home node's store alone where that has all it takes, for
        which nobody has to wait."""
        lead = self._agents[self._home]
        found = self._all({self._home: lead.look.remote(source)})[self._home]
        if found is None:
            return self.read_facts(source)
        facts, info_hash = found
        return facts_from_json(facts), info_hash

    def read_facts(self, source: SourceSpec) -> tuple[ReleaseFacts, str | None]:
        """What the release is and its info-hash, learnt by the agent of the home node.

        While another deployment or command works on it there, this one waits. On other nodes
        nobody does, so that no two deployments can wait for each other.
        """
        lead = self._agents[self._home]
        self._info_hash = self._all({self._home: lead.identify.remote(source)})[self._home]
        self._look_for_lenders([self._home])
        lenders = tuple(self._lenders.values())
        answer = lead.metadata.remote(source, None, lenders, waits=True)
        info_hash = self._all({self._home: answer})[self._home]
        facts = self._all({self._home: lead.facts.remote(source.given, source.known)})
        return facts_from_json(facts[self._home]), info_hash

    def inventory(self, info_hash: str | None) -> Inventory:
        """Every node as its agent measured it, by host."""
        refs = {host: agent.inventory.remote(info_hash) for host, agent in self._agents.items()}
        found = self._all(refs, timeout_s=START_TIMEOUT_S)
        nodes = tuple(found[host] for host in sorted(found))
        return Inventory(nodes=nodes, links=remembered_links(nodes))

    def metadata(self, hosts: Sequence[str], source: SourceSpec) -> None:
        """Let the agents of `hosts` learn what the release consists of. After `read_facts`."""
        self._source = source
        if source.kind == "magnet":
            # Some nodes may have no way out to ask for it, and none needs to ask again.
            lead = self._agents[self._home]
            self._torrent = self._all({self._home: lead.torrent.remote()})[self._home]
        self._tell_metadata(hosts)

    def restrict(self, shares: Mapping[str, tuple[ByteRange, ...] | None]) -> None:
        """Let each host want these bytes of the weights alone; None: the whole release."""
        self._shares = {**self._shares, **shares}
        self._all(
            {host: self._agents[host].restrict.remote(ranges) for host, ranges in shares.items()}
        )

    def order(self, steps: Mapping[str, tuple[tuple[ByteRange, ...], ...]]) -> None:
        """Let each host bring the bytes of each of its steps before those of the next."""
        self._all({host: self._agents[host].order.remote(each) for host, each in steps.items()})

    def folders(self, hosts: Sequence[str]) -> dict[str, str]:
        """The release folder on each host, which `download` fills."""
        return self._all({host: self._agents[host].folder.remote() for host in hosts})

    def check_disks(self, hosts: Sequence[str]) -> None:
        """Raise DiskSpaceError where a share does not fit, before any of it is downloaded."""
        self._all({host: self._agents[host].check_disk.remote() for host in hosts})

    def divide(self, hosts: Sequence[str], wan_mbps: Mapping[str, float]) -> None:
        """Let the next `download` bring each piece from outside once, and share it inside.

        What other deployments hold or are bringing is left to them. `wan_mbps` is how fast hosts
        get bytes from outside, where that is known; 0: not at all.
        """

        def lenders() -> list[Member]:
            self._look_for_lenders(hosts)
            return [lender.member() for lender in self._lenders.values()]

        self._foreman = Foreman(self._crew, wan_mbps=wan_mbps, lenders=lenders)
        members = self._crew("join", dict.fromkeys(hosts, ()))
        with turn(self._info_hash or "", self._deployment, self._stop):
            self._foreman.divide(members)

    def download(self, hosts: Sequence[str]) -> None:
        """Bring to each of `hosts` what it wants."""
        again: list[Any] = []

        def look() -> None:
            """Whoever is done but has something new to bring begins once more."""
            if self._foreman is not None:
                again.extend(self._agents[host].download.remote() for host in self._foreman.look())

        refs = {host: self._agents[host].download.remote() for host in hosts}
        self._all(refs, meanwhile=look)
        while again:
            batch, again = again, []
            gather(batch, who="an agent", stop=self._stop, meanwhile=look)

    def verify(self, hosts: Sequence[str]) -> None:
        """Check the release's own checksums on all of `hosts`."""
        self._all({host: self._agents[host].verify.remote() for host in hosts})

    def fetched(self, hosts: Sequence[str]) -> tuple[FetchedShare, ...]:
        """What was brought to each host."""
        return tuple(
            self._all({host: self._agents[host].fetched.remote() for host in hosts}).values()
        )

    def traffic(self) -> tuple[dict[str, Any], ...]:
        """What went between each node and its peers so far, as `Traffic` has it. Any thread."""
        calls = [agent.traffic.remote() for agent in list(self._agents.values())]
        return tuple(gather(calls, who="an agent", stop=self._stop, timeout_s=TRAFFIC_TIMEOUT_S))

    def end_fetches(self) -> None:
        """End all fetches and keep what resumes them; what is there is lent to whoever asks."""
        self._all({host: agent.end_fetch.remote() for host, agent in self._agents.items()})

    def renew(self, nodes: Sequence[RayNode]) -> None:
        """Let these nodes have an agent that lives, and what it has to bring. After `end_fetches`.

        Blocks, where an agent is new, until what its node lacks is there. Any thread.
        """
        with self._renewing:
            dead = [node for node in nodes if not self._lives(node.host)]
            for node in dead:
                self._agents[node.host] = self._start(node)
                self._cursors[node.host] = 0
            hosts = [node.host for node in dead]
            if not hosts:
                return
            self._tell_metadata(hosts)
            self.restrict({host: self._shares[host] for host in hosts if host in self._shares})
            self.check_disks(hosts)
            self.folders(hosts)
            self._all({host: self._agents[host].download.remote() for host in hosts})
            self.verify(hosts)
            self._all({host: self._agents[host].end_fetch.remote() for host in hosts})

    def interrupt(self) -> None:
        """Make whatever the agents are doing end with InterruptedByUserError, soon."""
        for agent in self._agents.values():
            agent.stop.remote()

    def stop(self) -> None:
        """End all work, keep what resumes it, end the agents; errors of dying ones are ignored."""
        import ray

        self.interrupt()
        closed = [agent.close.remote() for agent in self._agents.values()]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=CLOSE_TIMEOUT_S)
        for agent in self._agents.values():
            ray.kill(agent)
        self._agents = {}

    def _start(self, node: RayNode) -> Any:
        import ray

        return (
            ray.remote(NodeAgent)
            .options(
                name=agent_name(self._deployment, node.host),
                lifetime=self._lifetime,
                num_cpus=0,
                max_concurrency=_METHODS_AT_ONCE,
                label_selector=node.selector,
            )
            .remote(
                host=node.host,
                address=node.address,
                store=self._store,
                memory_limit_bytes=node.memory_bytes,
                cpu_limit=node.num_cpus,
                shares_lan=len(self._addresses) > 1,
                deployment=self._deployment,
            )
        )

    def _lives(self, host: str) -> bool:
        import ray

        agent, cursor = self._agents[host], self._cursors[host]
        try:
            answer = agent.progress.remote(cursor)
            call(answer, who=f"the agent on {host}", timeout_s=LIVES_TIMEOUT_S)
        except MagnetarError:
            ray.kill(agent)  # one that does not answer must not stay beside the next
            return False
        return True

    def _tell_metadata(self, hosts: Sequence[str]) -> None:
        self._look_for_lenders(hosts)
        told = (self._source, self._torrent, tuple(self._lenders.values()))
        self._all({host: self._agents[host].metadata.remote(*told) for host in hosts})

    def _look_for_lenders(self, fetching: Sequence[str]) -> None:
        """Nodes that hold the release, of all deployments, but for those of ours that fetch it."""
        if self._info_hash is not None:
            ours = [agent_name(self._deployment, host) for host in fetching]
            self._lenders = find_lenders(self._info_hash, self._addresses, but=ours)

    def _crew(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """A `Crew`; one that dies ends the deployment."""
        refs = [
            getattr(self._agents[host], method).remote(*of_host)
            for host, of_host in arguments.items()
        ]
        results = gather(refs, who=f"an agent of {', '.join(arguments)}", stop=self._stop)
        return dict(zip(arguments, results, strict=True))

    def _all(
        self,
        refs: dict[str, Any],
        *,
        timeout_s: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        def tell() -> None:
            self._relay(refs)
            meanwhile()

        results = gather(
            list(refs.values()),
            who=f"the agent on {', '.join(refs)}",
            stop=self._stop,
            timeout_s=timeout_s,
            meanwhile=tell,
        )
        self._relay(refs)
        return dict(zip(refs, results, strict=True))

    def _relay(self, hosts: dict[str, Any]) -> None:
        for host in hosts:
            who = f"the agent on {host}"
            news, cursor = call(self._agents[host].progress.remote(self._cursors[host]), who=who)
            self._cursors[host] = cursor
            for progress in news:
                self._on_progress(progress)
