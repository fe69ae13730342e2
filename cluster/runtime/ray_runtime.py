"""Ray, started by itself or joined: authenticated, silent, small, at an explicit address.

Ray is the control plane only. Its ports listen on every interface whatever address it is given,
so the token is always on; it is worth as much as a shell on every node.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import MagnetarError, NotFoundError, UsageError
from ...settings import data_dir
from ..inventory.inventory import host_label

NAMESPACE = "magnetar"
HOST_LABEL = "magnetar/host"
OBJECT_STORE_BYTES = 100 << 20
"""Nothing large travels through Ray; its own default is 30 % of the memory."""
CONNECT_TIMEOUT_S = 5.0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_COLOR_PREFIX": "0",
    # Otherwise a FutureWarning for every actor without a GPU share.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayNode:
    """One node of the cluster that is connected."""

    host: str
    """Stable label, or the node's address where it has none."""
    address: str
    node_id: str
    """Of this incarnation; changes when the node's Ray restarts."""
    labelled: bool
    memory_bytes: int | None
    """What its owner gave to Ray."""
    num_cpus: int | None
    """Likewise; None where it is none at all."""
    is_head: bool

    @property
    def selector(self) -> dict[str, str]:
        """Places an actor or a bundle on this node."""
        return {HOST_LABEL: self.host} if self.labelled else {"ray.io/node-id": self.node_id}


def prepare_environment() -> None:
    """Set what Ray reads from the environment; must run before `ray` is imported.

    ``RAY_AUTH_MODE`` and the token variables win where the user has set them.

    Raises:
        UsageError: `ray` was imported before, without authentication.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        if "ray" in sys.modules:
            raise UsageError(
                "ray was imported before Magnetar could turn its authentication on; "
                "import it later, or set RAY_AUTH_MODE yourself"
            )
        os.environ["RAY_AUTH_MODE"] = "token"
    if os.environ["RAY_AUTH_MODE"] == "token" and not (
        "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    ):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(data_dir()))
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def token_file(folder: Path) -> Path:
    """The cluster token of this user, made on first use; nobody else can read it."""
    path = folder / "ray" / "token"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)  # the first of several starters wins
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    return path


@contextmanager
def local_ray() -> Iterator[str]:
    """A Ray of this process and its children, ended on the way out; yields its address.

    It dies with this process, however that ends.
    """
    prepare_environment()
    folder = Path(tempfile.mkdtemp(prefix="magnetar-", dir=_short_temp()))
    options: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "labels": {HOST_LABEL: host_label()},
        "_temp_dir": str(folder),
    }
    if sys.platform == "linux":
        # Of its own, so that the addresses last when the network changes. Not 127.0.0.1, which
        # Ray rewrites to that of the network card.
        options["_node_ip_address"] = "127.0.0.2"
    try:
        yield _init(options)
    finally:
        _shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined_ray(address: str) -> Iterator[str]:
    """The connection to a cluster that exists; yields its address.

    Raises:
        UsageError: no ``HOST:PORT``.
        NotFoundError: nobody listens there.
        MagnetarError: somebody does, but it is no Ray of this version that takes our token.
    """
    prepare_environment()
    _check_reachable(address)
    try:
        yield _init({"address": address})
    finally:
        _shutdown()


def ray_nodes() -> tuple[RayNode, ...]:
    """The living nodes of the cluster that is connected, by host label.

    Raises:
        UsageError: two nodes have the same label.
    """
    nodes = _living()
    for before, after in pairwise(nodes):
        if before.host == after.host:
            raise UsageError(
                f"two nodes of the cluster are called {before.host!r}; start each with its own "
                f'--labels "{HOST_LABEL}=NAME"'
            )
    for node in nodes:
        if not node.labelled:
            _logger.warning(
                "node %s has no label %s; its stages will not come back when its Ray restarts",
                node.address,
                HOST_LABEL,
            )
    return tuple(nodes)


def home_node(nodes: tuple[RayNode, ...]) -> RayNode:
    """The node this process is connected through."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return next(node for node in nodes if node.node_id == own)


def living_nodes() -> dict[str, RayNode]:
    """As `ray_nodes`, by host and without complaints: where two have a label, either."""
    return {node.host: node for node in _living()}


def _living() -> list[RayNode]:
    import ray

    nodes = []
    for row in ray.nodes():
        if not row["Alive"]:
            continue
        labels: Mapping[str, str] = row.get("Labels", {})
        memory = row["Resources"].get("memory")
        nodes.append(
            RayNode(
                host=labels.get(HOST_LABEL, row["NodeManagerAddress"]),
                address=row["NodeManagerAddress"],
                node_id=row["NodeID"],
                labelled=HOST_LABEL in labels,
                memory_bytes=None if memory is None else int(memory),
                num_cpus=int(row["Resources"].get("CPU", 0)) or None,
                is_head="node:__internal_head__" in row["Resources"],
            )
        )
    return sorted(nodes, key=lambda node: node.host)


def _init(options: dict[str, Any]) -> str:
    import ray
    from ray._private import worker

    # Ray prints "(raylet) ..." to stdout whatever its logging options are, and stdout is for data.
    worker.print_to_stdstream = _say_nothing
    with _keeping_sigterm():
        try:
            context = ray.init(
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                **options,
            )
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MagnetarError(
                f"Ray at {options['address']} did not let us in ({first}); its Ray and Python "
                "versions and its token (RAY_AUTH_TOKEN_PATH) must be those of this machine"
            ) from error
    return str(context.address_info["address"])


def _shutdown() -> None:
    import ray

    with _keeping_sigterm():
        ray.shutdown()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray installs a handler of its own, which would end us without cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_nothing(*_args: object, **_options: object) -> None:
    """Stands in for Ray's printer."""


def _short_temp() -> str:
    """Unix socket paths end at 107 bytes and Ray adds about 62."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 20 else "/tmp"


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UsageError(f"{address!r} is no Ray address; give HOST:PORT, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise NotFoundError(
            f"no Ray cluster answers at {address} ({error}); start one with "
            "`ray start --head`, or leave --ray-address out"
        ) from error
