"""SOURCE may be a link, a name, a file or a folder, and is never guessed at silently."""

from pathlib import Path

import pytest

from magnetar.errors import MagnetError, NotFoundError, UsageError
from magnetar.fetcher.checkpoint.described import described_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.magnet import parse_magnet
from magnetar.manifests.catalogue import find_release, known_hints, listed, releases
from magnetar.manifests.source import deployment_name, release_name, resolve_source

MIXTRAL = "5546272da9065eddeb6fcd7ffddeef5b75be79a7"
# As it stood in the announcement, after the site's link rewriting.
TWEET = (
    f"magnet:?xt=urn:btih:{MIXTRAL}&dn=mixtral-8x7b-32kseqlen"
    "&tr=udp%3A%2F%http://2Fopentracker.i2p.rocks%3A6969%2Fannounce"
    "&tr=http%3A%2F%http://2Ftracker.openbittorrent.com%3A80%2Fannounce"
)
MIXTRAL_HINTS = ReleaseHints(
    rope_theta=1e6, sliding_window="none", max_context_tokens=32768, chat_format="none"
)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_torrent(folder: Path) -> bytes:
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    return create_torrent(folder)


def test_catalogue_links_need_no_repair_and_have_the_hash_they_claim() -> None:
    assert {release.name for release in releases()} == {
        "mistral-7b",
        "mixtral-8x22b",
        "mixtral-8x7b",
    }
    for release in releases():
        magnet = parse_magnet(release.magnet)
        assert magnet.repairs == ()
        assert magnet.info_hash == release.info_hash
        assert magnet.trackers


def test_no_two_releases_share_a_name_or_a_hash() -> None:
    names = [name for release in releases() for name in (release.name, *release.aliases)]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)
    assert len({release.info_hash for release in releases()}) == len(releases())


def test_catalogue_states_every_fact_that_a_bare_release_lacks() -> None:
    assert known_hints(MIXTRAL) == MIXTRAL_HINTS
    seven = find_release("mistral-7b").facts.hints()
    assert (seven.rope_theta, seven.sliding_window) == (1e4, 4096)
    assert find_release("Mixtral-8x22B").facts.max_context_tokens == 65536
    for release in releases():
        hints = release.facts.hints()
        assert None not in (hints.rope_theta, hints.sliding_window, hints.max_context_tokens)
        assert hints.chat_format == "none"
        assert release.kind == "base"


@pytest.mark.parametrize(
    "text",
    [
        TWEET,
        TWEET.removeprefix("magnet:?"),
        TWEET.replace("&", "&amp;"),
        f"  {TWEET}\n",
        MIXTRAL,
        MIXTRAL.upper(),
        f"magnet:?xt=urn:btih:{MIXTRAL}",
        "mixtral-8x7b",
        "Mixtral",
    ],
)
def test_every_spelling_of_a_known_torrent_finds_its_facts_and_name(text: str) -> None:
    source = resolve_source(text)
    assert source.kind == "magnet"
    assert parse_magnet(source.location).info_hash == MIXTRAL
    assert source.known == MIXTRAL_HINTS
    assert release_name(source) == "mixtral-8x7b"


def test_repairs_are_said() -> None:
    notes: list[str] = []
    source = resolve_source(TWEET, on_note=notes.append)
    assert notes
    assert all(note.startswith("magnet link: ") for note in notes)
    assert len(parse_magnet(source.location).trackers) == 2


def test_what_the_user_gives_travels_along() -> None:
    given = ReleaseHints(rope_theta=5.0)
    source = resolve_source(MIXTRAL, peers=("10.0.0.1:5",), timeout_s=3.0, given=given)
    assert (source.peers, source.timeout_s, source.given) == (("10.0.0.1:5",), 3.0, given)


def test_unknown_torrent_has_no_facts() -> None:
    source = resolve_source("magnet:?xt=urn:btih:" + "ab" * 20 + "&dn=Some_Model")
    assert source.known == ReleaseHints()
    assert release_name(source) == "Some_Model"
    assert release_name(resolve_source("ab" * 20)) == "abababababab"


def test_folder_and_torrent_file_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "x.torrent").write_bytes(make_torrent(tmp_path / "release"))
    folder, torrent = resolve_source("release"), resolve_source("./x.torrent")
    assert (folder.kind, folder.location) == ("folder", str(tmp_path / "release"))
    assert (torrent.kind, torrent.location) == ("torrent", str(tmp_path / "x.torrent"))
    assert (release_name(folder), release_name(torrent)) == ("release", "x")


def test_catalogue_name_wins_over_a_folder_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    notes: list[str] = []
    assert resolve_source("mixtral-8x7b", on_note=notes.append).kind == "magnet"
    assert "./mixtral-8x7b" in notes[0]
    assert resolve_source("./mixtral-8x7b").kind == "folder"


@pytest.mark.parametrize("text", ["", "  ", "no/such/folder", "gone.torrent", "./x"])
def test_path_that_is_not_there_is_not_found(text: str) -> None:
    with pytest.raises(NotFoundError, match="no file or folder"):
        resolve_source(text)


def test_misspelt_name_is_guessed() -> None:
    with pytest.raises(NotFoundError, match="did you mean 'mistral-7b'"):
        resolve_source("mistral7b")


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"is no \.torrent file"):
        resolve_source("consolidated.00.pth")


@pytest.mark.parametrize("text", ["magnet:", "magnet:?dn=x", "magnet:?xt=urn:btih:zz"])
def test_link_beyond_repair_is_refused(text: str) -> None:
    with pytest.raises(MagnetError):
        resolve_source(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mixtral-8x7b", "mixtral-8x7b"),
        ("Mistral_7B.v0.1", "mistral-7b-v0-1"),
        ("--", "model"),
        ("x" * 99, "x" * 63),
        ("ünïcode", "n-code"),
    ],
)
def test_deployment_name_is_a_dns_label(model: str, name: str) -> None:
    assert deployment_name(model) == name


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x22b", 140_620_634_112),
    ],
)
def test_the_catalogue_knows_what_its_releases_consist_of(name: str, num_params: int) -> None:
    release = find_release(name)
    given, known = ReleaseHints(), release.facts.hints()
    config, index = described_release(release.params, release.dtype, given=given, known=known)
    assert sum(entry.num_bytes for entry in index) == 2 * num_params
    assert listed(release.info_hash) is release
    assert config.max_context_tokens == known.max_context_tokens
    assert listed("0" * 40) is None
