"""The shape of a manifest: what a deployment may be asked to be, field by field.

Keys are camelCase in YAML. Values are strict: a number is not a string, and nothing is converted.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..cluster.machines import ComputeDtype
from ..cluster.spec import DeploymentSpec
from ..fetcher.rates import RateLimits, parse_rate
from ..settings import DEFAULT_HOST, DEFAULT_PORT, default_store
from .facts import Facts, Part, checked
from .placement import Placement
from .source import release_name, resolve_source

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
SOURCES = ("magnet", "catalogue", "torrent", "folder")


def _check_magnet(text: str) -> None:
    from ..fetcher.torrent.magnet import parse_magnet

    parse_magnet(text)


def _check_tracker(text: str) -> None:
    from ..fetcher.torrent.magnet import check_tracker

    check_tracker(text)


def _check_web_seed(text: str) -> None:
    from ..fetcher.torrent.magnet import check_web_seed

    check_web_seed(text)


def _check_peer(text: str) -> None:
    from ..fetcher.torrent.magnet import split_peer

    split_peer(text)


def _check_catalogue_name(text: str) -> None:
    from .catalogue import find_release

    find_release(text)


Address = Annotated[str, checked(_check_peer)]
Rate = Annotated[str, checked(parse_rate)]


class Source(Facts):
    """Where the release comes from, and facts that win over its own files and the catalogue."""

    magnet: Annotated[str, checked(_check_magnet)] | None = Field(
        default=None, description="A magnet link; mangled ones are repaired."
    )
    catalogue: Annotated[str, checked(_check_catalogue_name)] | None = Field(
        default=None, description="Name of a known release, such as mixtral-8x7b."
    )
    torrent: str | None = Field(
        default=None, min_length=1, description="A .torrent file, relative to the manifest."
    )
    folder: str | None = Field(
        default=None, min_length=1, description="A release folder, relative to the manifest."
    )
    peers: list[Address] = Field(
        default_factory=list, description="HOST:PORT of peers to ask besides those of the swarm."
    )
    trackers: list[Annotated[str, checked(_check_tracker)]] = Field(
        default_factory=list, description="Trackers to ask besides those of the link."
    )
    web_seeds: list[Annotated[str, checked(_check_web_seed)]] = Field(
        default_factory=list, description="HTTP servers that hold the files too (BEP 19)."
    )
    timeout_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Give up when nothing arrives for this long; without it, wait for ever.",
    )
    download_limit: Rate | None = Field(
        default=None,
        description="What each node takes from outside at most a second, such as 20MB.",
    )
    upload_limit: Rate | None = Field(
        default=None,
        description="What each node gives to outside at most (4 MiB a second); 0: no limit.",
    )

    def limits(self) -> RateLimits:
        """The limits, read."""
        down, up = self.download_limit, self.upload_limit
        return RateLimits(
            download_bytes_per_s=0 if down is None else parse_rate(down),
            upload_bytes_per_s=None if up is None else parse_rate(up),
        )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "Source":
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "value",
                "should have exactly one of {sources}; it has {given}",
                {"sources": ", ".join(SOURCES), "given": " and ".join(given) or "none of them"},
            )
        return self


class Model(Part):
    """What is computed."""

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="What clients pass as `model`; the release's name by default.",
    )
    dtype: ComputeDtype | None = Field(
        default=None,
        description="Number format of the weights in memory; the checkpoint's by default. int8 and "
        "int4 are rounded while loading.",
    )
    max_context_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest text to serve; the model's own, cut to fit, by default.",
    )
    batch_invariant: bool = Field(
        default=False,
        description="Reproducible mode: what a request gets depends, to the last bit, on nothing "
        "but itself, not on other requests, chunks, the cache or the number of stages; slower "
        "where the compiled kernels cannot be used.",
    )


class Serve(Part):
    """How it is reached."""

    host: str = Field(default=DEFAULT_HOST, min_length=1, description="Address to listen on.")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="Port; 0 takes a free one.")
    max_concurrency: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Requests of full context whose keys and values are to fit in memory.",
    )
    max_running: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Requests worked on at a time, most of them shorter than the context; by "
        "default 64, or maxConcurrency if that is more.",
    )
    max_waiting: int = Field(
        default=256,
        ge=0,
        le=65536,
        description="Requests that wait beside them; more are answered 429, with Retry-After.",
    )
    api_key_file: str | None = Field(
        default=None,
        min_length=1,
        description="File with the key that clients must send, relative to the manifest; needed "
        "to listen on anything but loopback.",
    )


class Metadata(Part):
    """What it is called."""

    name: str = Field(
        pattern=NAME_PATTERN, description="Name of the deployment: a DNS label (a-z, 0-9, -)."
    )


class Spec(Part):
    """What is wanted."""

    source: Source = Field(description="Where the release comes from.")
    model: Model = Field(default_factory=Model, description="What is computed.")
    placement: Placement = Field(default_factory=Placement, description="Where it runs.")
    serve: Serve = Field(default_factory=Serve, description="How it is reached.")

    @field_validator("model", "placement", "serve", mode="before")
    @classmethod
    def _key_without_entries(cls, value: object) -> object:
        # `serve:` with every entry commented out asks for the defaults.
        return {} if value is None else value


class Deployment(Part):
    """One model, served: a whole manifest."""

    api_version: Literal["magnetar/v1"] = Field(description="Version of this format.")
    kind: Literal["Deployment"] = Field(description="What the manifest describes.")
    metadata: Metadata = Field(description="What it is called.")
    spec: Spec = Field(description="What is wanted.")

    def to_spec(
        self, *, base: Path, on_note: Callable[[str], None] | None = None
    ) -> DeploymentSpec:
        """The same for the controller; ``base`` is the folder that relative paths start from.

        Raises:
            NotFoundError: a .torrent file or release folder that is not there.
        """
        source, model = self.spec.source, self.spec.model
        placement, serve = self.spec.placement, self.spec.serve
        kind = next(name for name in SOURCES if getattr(source, name) is not None)
        location: str = getattr(source, kind)
        resolved = resolve_source(
            location if kind in ("magnet", "catalogue") else _path(base, location),
            peers=tuple(source.peers),
            timeout_s=source.timeout_seconds,
            given=source.hints(),
            on_note=on_note,
        )
        resolved = replace(
            resolved,
            trackers=tuple(source.trackers),
            web_seeds=tuple(source.web_seeds),
            limits=source.limits(),
        )
        return DeploymentSpec(
            name=self.metadata.name,
            source=resolved,
            store=_path(base, placement.store) if placement.store else str(default_store()),
            model_name=model.name or release_name(resolved),
            dtype=model.dtype,
            batch_invariant=model.batch_invariant,
            num_stages=placement.stages,
            num_pipelines=placement.pipelines,
            objective=placement.objective,
            wan_mbps=placement.wan_mbps,
            node_wishes=tuple(use.to_wish() for use in placement.nodes),
            expert_pins=tuple(experts.to_pin() for experts in placement.experts),
            max_context_tokens=model.max_context_tokens,
            max_concurrency=serve.max_concurrency,
            max_running=serve.max_running,
            max_waiting=serve.max_waiting,
            host=serve.host,
            port=serve.port,
            api_key_file=_path(base, serve.api_key_file) if serve.api_key_file else None,
        )


def _path(base: Path, text: str) -> str:
    return str((base / Path(text).expanduser()).absolute())
