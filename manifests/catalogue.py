"""The releases that Magnetar knows: their magnet links and the facts that their files lack."""

import functools
import importlib.resources
from typing import Literal

from pydantic import Field

from ..errors import NotFoundError
from ..fetcher.config import ReleaseHints
from .facts import Facts, Part
from .suggest import did_you_mean
from .yaml_loader import load_yaml


class Release(Part):
    """One published release."""

    name: str = Field(description="What people call it on the command line.")
    aliases: list[str] = Field(default_factory=list, description="Other names for it.")
    info_hash: str = Field(pattern=r"^[0-9a-f]{40}$", description="Version 1 info-hash.")
    magnet: str = Field(description="Magnet link, repaired.")
    kind: Literal["base", "instruct"] = Field(description="Whether it was tuned to chat.")
    facts: Facts = Field(description="What the release's files lack.")
    params: dict[str, int | float | dict[str, int]] = Field(
        description="What its params.json says of the shapes of tensors."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(description="Of its tensors.")
    source: str = Field(description="Where it was published and where the facts come from.")


@functools.cache
def releases() -> tuple[Release, ...]:
    """Every release of the catalogue, by name."""
    folder = importlib.resources.files(__package__) / "catalogue"
    found = []
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            document = load_yaml(file.read_bytes())
            assert not document.problems, f"{file.name}: {document.problems}"
            found.append(Release.model_validate(document.value))
    return tuple(sorted(found, key=lambda release: release.name))


def find_release(name: str) -> Release:
    """The release of that name or alias, whatever the case of its letters.

    Raises:
        NotFoundError: there is none.
    """
    by_name = {
        alias: release for release in releases() for alias in (release.name, *release.aliases)
    }
    if release := by_name.get(name.lower()):
        return release
    names = ", ".join(release.name for release in releases())
    raise NotFoundError(
        f"the catalogue has no release {name[:80]!r}{did_you_mean(name, by_name) or '.'} "
        f"It has {names}."
    )


def listed(info_hash: str | None) -> Release | None:
    """The release of a torrent; None where it is not in the catalogue."""
    return next((each for each in releases() if each.info_hash == info_hash), None)


def known_hints(info_hash: str | None) -> ReleaseHints:
    """What the catalogue knows about a torrent; nothing where it is not listed."""
    release = listed(info_hash)
    return ReleaseHints() if release is None else release.facts.hints()
