"""Deployments from the side of a command: bring up, ask, take down; from any process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..cluster.deployment.lenders import find_lenders
from ..cluster.deployment.status import DeploymentStatus
from ..cluster.journal import FileJournal, deployment_record, deployment_records
from ..cluster.plan import Plan
from ..cluster.runtime.process_mark import ProcessMark
from ..cluster.runtime.ray_head import start_head, stop_head
from ..cluster.runtime.ray_runtime import home_node, joined_ray, local_ray, ray_nodes
from ..cluster.spec import DeploymentSpec
from ..errors import NotFoundError, StageLostError, TimedOutError, UsageError
from ..fetcher.progress import ProgressSink
from ..fetcher.torrent.lending import Lender
from ..settings import data_dir
from .api.server import bind
from .preview import PlanPreview, Running, plan_only
from .session import (
    POLL_S,
    STOP_TIMEOUT_S,
    Session,
    already_up,
    deployments,
    find_controller,
    start_controller,
)

__all__ = [
    "Endpoint",
    "PlanPreview",
    "Running",
    "down",
    "lenders",
    "plan_only",
    "running",
    "status",
    "up",
]


class Endpoint:
    """A deployment that serves. `close` ends it unless it is detached."""

    def __init__(
        self,
        session: Session,
        status: DeploymentStatus,
        *,
        stop: threading.Event,
        end: contextlib.ExitStack,
        connection: contextlib.ExitStack,
        detached: bool,
    ) -> None:
        assert status.url is not None
        assert status.plan is not None
        self.url: str = status.url
        self.model_name: str = status.model_name
        self.chat_format: str = status.chat_format or "none"
        self.plan: Plan = status.plan
        self._session = session
        self._stop = stop
        self._end = end
        self._connection = connection
        self._detached = detached

    def wait(
        self,
        stop: threading.Event | None = None,
        *,
        on_warning: Callable[[str], None] = lambda text: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Return when `stop` is set (by default the one that `up` was given).

        `on_warning` hears, once each, what is amiss although the deployment goes on, and `on_note`
        when a pipeline that was lost is back.

        Raises:
            MagnetarError: the deployment failed or was stopped by somebody else.
        """
        stop = stop or self._stop
        told: set[str] = set()
        while not stop.wait(5 * POLL_S):
            status = self._session.poll().status
            if status.failure is not None:
                raise status.failure.to_error()
            amiss = {each.message for each in status.conditions if not each.status}
            back = {each.message for each in status.conditions if each.reason == "Restarted"}
            for message in sorted(amiss - told):
                on_warning(message)
            for message in sorted(back - told):
                on_note(message)
            told = amiss | back

    def close(self) -> None:
        """End the deployment, or only leave it alone when it is detached."""
        if not self._detached:
            self._end.close()
        self._connection.close()


def up(
    spec: DeploymentSpec,
    *,
    ray_address: str | None = None,
    detach: bool = False,
    on_progress: ProgressSink,
    stop: threading.Event,
) -> Endpoint:
    """Bring a deployment up; returns when it answers.

    Without `ray_address` Ray starts by itself, and ends with this process unless `detach`.

    Raises:
        MagnetarError: whatever kept it from serving; everything it had started has ended.
        InterruptedByUserError: `stop` was set.
    """
    api_key = _api_key(spec)
    record = deployment_record(spec.name)
    _refuse_second(spec.name, record, ray_address)
    if ray_address is None:
        # Said at once; the gateway takes the port itself when Ray is up.
        bind(spec.host, spec.port, has_api_key=api_key is not None).close()
    with contextlib.ExitStack() as on_failure:
        head: ProcessMark | None = None
        if detach and ray_address is None:
            folder = record.path.parent
            head, ray_address = start_head(
                folder / f"{spec.name}.head", log=folder / f"{spec.name}.log", stop=stop
            )
            on_failure.callback(stop_head, head)
        connection = on_failure.enter_context(contextlib.ExitStack())
        ray = local_ray() if ray_address is None else joined_ray(ray_address)
        address = connection.enter_context(ray)
        end = on_failure.enter_context(contextlib.ExitStack())
        session = Session(start_controller(spec, api_key=api_key, detached=detach))
        end.callback(record.forget)
        end.callback(session.stop)
        record.write(
            {
                "name": spec.name,
                "address": address,
                "head": _marked(head),
                "command": None if detach else _marked(ProcessMark.of_this_process()),
            }
        )
        status = session.until_serving(on_progress, stop)
        on_failure.pop_all()
    return Endpoint(session, status, stop=stop, end=end, connection=connection, detached=detach)


def status(name: str | None = None, *, ray_address: str | None = None) -> list[dict[str, Any]]:
    """Deployments that were started from this machine, or those of a Ray cluster, as JSON types.

    Each has the fields of `DeploymentStatus`, `ready`, the `address` of its Ray, and as
    `expert_tokens` by layer the tokens that each expert was chosen for, as `traffic` by node what
    its peers gave and took; one whose Ray is gone has
    ``"phase": "lost"`` instead of most of them.

    Raises:
        NotFoundError: there is none called `name`.
    """
    if ray_address is not None:
        with joined_ray(ray_address):
            found = [_ask(each, ray_address) for each in deployments() if name in (None, each)]
    else:
        found = [_status_of(record) for record in _records(name)]
    if name is not None and not found:
        raise _not_found(name, ray_address)
    return found


def running(name: str, *, ray_address: str | None = None) -> Running:
    """The plan by which a deployment runs, and the traffic that it has seen.

    Raises:
        NotFoundError: there is none called `name`, or it has no plan yet.
    """
    record = deployment_record(name).read()
    if record is None and ray_address is None:
        raise _not_found(name, ray_address)
    with joined_ray(ray_address or str((record or {})["address"])):
        session = Session(find_controller(name))
        status, expert_tokens = session.poll().status, session.expert_tokens()
    if status.plan is None:
        raise NotFoundError(f"{name!r} has no plan yet: it is at the phase {status.phase}")
    return Running(plan=status.plan, expert_tokens=expert_tokens)


def down(name: str, *, ray_address: str | None = None) -> None:
    """End a deployment and everything that was started for it; what it downloaded is kept.

    Raises:
        NotFoundError: there is none of that name.
        TimedOutError: the command that holds it did not end.
    """
    journal = deployment_record(name)
    record = journal.read()
    if record is None and ray_address is None:
        raise _not_found(name, ray_address)
    record = record or {}
    if (command := _mark(record.get("command"))) is not None and (held := command.process()):
        held.terminate()  # it ends its deployment by itself
        _wait_gone(command, name)
        return
    address, head = ray_address or str(record["address"]), _mark(record.get("head"))
    with contextlib.ExitStack() as in_any_case:
        if head is not None:
            in_any_case.callback(stop_head, head)
        try:
            with joined_ray(address):
                Session(find_controller(name)).stop()
        except NotFoundError:
            if not record:
                raise
        except KeyboardInterrupt:
            in_any_case.pop_all()  # what was asked to end goes on ending
            raise
    journal.forget()


def lenders(info_hash: str, *, ray_address: str) -> tuple[tuple[Lender, ...], str]:
    """Nodes of a Ray cluster that hold a release, and our address, from which they expect us."""
    with joined_ray(ray_address):
        ours = home_node(ray_nodes()).address
        return tuple(find_lenders(info_hash, (ours,)).values()), ours


def _ask(name: str, address: str) -> dict[str, Any]:
    session = Session(find_controller(name))
    status, tokens = session.poll().status, session.expert_tokens()
    told = {str(layer): list(counts) for layer, counts in sorted(tokens.items())}
    more = {"address": address, "expert_tokens": told, "traffic": session.traffic()}
    return status.to_json() | more


def _status_of(record: dict[str, Any]) -> dict[str, Any]:
    name, address = str(record["name"]), str(record["address"])
    holder = _mark(record.get("command")) or _mark(record.get("head"))
    try:
        if holder is not None and holder.process() is None:
            raise NotFoundError(f"the process that held it (pid {holder.pid}) is gone")
        with joined_ray(address):
            return _ask(name, address)
    except (NotFoundError, StageLostError) as error:
        lost = {"name": name, "phase": "lost", "ready": False, "address": address}
        return lost | {"message": f"{error}; clean up with: magnetar down {name}"}


def _records(name: str | None) -> Iterator[dict[str, Any]]:
    journals = deployment_records() if name is None else [deployment_record(name)]
    for journal in journals:
        if (record := journal.read()) is not None:
            yield record


def _api_key(spec: DeploymentSpec) -> str | None:
    if spec.api_key_file is None:
        return None
    path = Path(spec.api_key_file).expanduser()
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"the API key file {path} cannot be read ({error})") from error
    if not key:
        raise UsageError(f"the API key file {path} is empty; write the key into it")
    return key


def _refuse_second(name: str, journal: FileJournal, ray_address: str | None) -> None:
    record = journal.read()
    if record is None:
        return
    holder = _mark(record.get("command")) or _mark(record.get("head"))
    if holder is None and record["address"] == ray_address:
        return  # in the same cluster its controller's name decides
    if holder is None or holder.process() is not None:
        raise already_up(name)
    journal.forget()  # left by a command that was killed


def _not_found(name: str, ray_address: str | None) -> NotFoundError:
    where = f"in the Ray cluster at {ray_address}" if ray_address else f"known in {data_dir()}"
    return NotFoundError(f"no deployment {name!r} is {where}; `magnetar status` lists what is")


def _wait_gone(mark: ProcessMark, name: str) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while mark.process() is not None:
        if time.monotonic() > deadline:
            raise TimedOutError(
                f"the command that holds {name!r} (pid {mark.pid}) did not end within "
                f"{STOP_TIMEOUT_S:.0f} s; end it yourself"
            )
        time.sleep(POLL_S)


def _marked(mark: ProcessMark | None) -> dict[str, float] | None:
    return None if mark is None else {"pid": mark.pid, "started": mark.started}


def _mark(record: dict[str, Any] | None) -> ProcessMark | None:
    if record is None:
        return None
    return ProcessMark(pid=int(record["pid"]), started=float(record["started"]))
