import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import MagnetError, UsageError
from magnetar.fetcher.torrent.magnet import Magnet, parse_magnet, split_peer

HASH = "5546272da9065eddeb6fcd7ffddeef5b75be79a7"
BASE32 = "KVDCOLNJAZPN323PZV773XXPLN2346NH"
V2 = "ab" * 32
TWEET = (
    f"magnet:?xt=urn:btih:{HASH}&dn=mixtral-8x7b-32kseqlen"
    "&tr=udp%3A%2F%http://2Fopentracker.i2p.rocks%3A6969%2Fannounce"
    "&tr=http%3A%2F%http://2Ftracker.openbittorrent.com%3A80%2Fannounce"
)


def test_repairs_the_mixtral_tweet_and_says_so() -> None:
    magnet = parse_magnet(TWEET)
    assert magnet.info_hash == HASH
    assert magnet.name == "mixtral-8x7b-32kseqlen"
    assert magnet.trackers == (
        "udp://opentracker.i2p.rocks:6969/announce",
        "http://tracker.openbittorrent.com:80/announce",
    )
    assert len(magnet.repairs) == 1
    assert "%http://2F" in magnet.repairs[0]


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (TWEET.removeprefix("magnet:?"), "missing magnet:?"),
        (TWEET.replace("magnet:?", "magnet:"), "missing magnet:?"),
        (TWEET.replace("&", "&amp;"), "&amp;"),
        (TWEET.replace("&", "&amp;amp;"), "&amp;"),
        (TWEET.replace("%http://2F", "%https://2F"), "%http://2F"),
        (f'"{TWEET}"', "quotes"),
        (f"  <{TWEET}>\n", "quotes"),
        (TWEET.replace("&tr", "\n &tr"), "over lines"),
        (TWEET.replace("&", "\\&").replace("?", "\\?"), "backslashes"),
    ],
)
def test_repairs_what_people_paste(damaged: str, said: str) -> None:
    magnet = parse_magnet(damaged)
    assert magnet.uri() == parse_magnet(TWEET).uri()
    assert any(said in repair for repair in magnet.repairs)


def test_a_sound_link_needs_no_repair() -> None:
    magnet = parse_magnet(f"magnet:?xt=urn:btih:{HASH.upper()}&dn=a+b&xl=5")
    assert (magnet.info_hash, magnet.name, magnet.repairs) == (HASH, "a b", ())


@pytest.mark.parametrize("digest", [BASE32, BASE32.lower()])
def test_reads_base32_hashes(digest: str) -> None:
    assert parse_magnet(f"magnet:?xt=urn:btih:{digest}").info_hash == HASH


def test_reads_v2_hashes_and_prefers_v1_of_a_hybrid() -> None:
    assert parse_magnet(f"magnet:?xt=urn:btmh:1220{V2}").info_hash == V2
    both = f"magnet:?xt=urn:btmh:1220{V2}&xt=urn:btih:{HASH}"
    assert parse_magnet(both).info_hash == HASH
    assert parse_magnet(both).info_hashes == (HASH, V2)


def test_takes_a_bare_hash() -> None:
    assert parse_magnet(HASH).info_hash == HASH
    assert parse_magnet(f"urn:btih:{HASH}").info_hash == HASH


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("ws=file:///etc/passwd", "file:///etc/passwd"),
        ("ws=udp%3A%2F%2Fhost%3A1%2F", "udp://host:1/"),
        ("tr=wss%3A%2F%2Ftracker.example%2F", "wss://tracker.example/"),
        ("tr=javascript%3Aalert(1)", "javascript:alert(1)"),
        ("tr=http%3A%2F%https://t.co/OdtBUsbeV5%3A1337%2Fannounce", "t.co"),
        ("tr=http%3A%2F%2F%5B%3A%3A1", "http://[::1"),
        ("tr=udp%3A%2F%2Fno.port%2Fannounce", "udp://no.port/announce"),
        ("x.pe=127.0.0.1:22", "127.0.0.1:22"),
        ("x.pe=nowhere", "nowhere"),
        ("x.pe=host:99999", "host:99999"),
        ("x.pe=a%0Ab:6881", "a?b:6881"),
        ("so=0-3", "so=0-3"),
    ],
)
def test_drops_what_has_no_business_there_and_says_so(field: str, said: str) -> None:
    magnet = parse_magnet(f"magnet:?xt=urn:btih:{HASH}&{field}")
    assert (magnet.trackers, magnet.web_seeds, magnet.peers) == ((), (), ())
    assert any(said in repair for repair in magnet.repairs)


def test_keeps_good_trackers_web_seeds_and_peers_once() -> None:
    magnet = parse_magnet(
        f"magnet:?xt.1=urn:btih:{HASH}&tr.1=udp%3A%2F%2Fa.example%3A1&tr.2=udp%3A%2F%2Fa.example%3A1"
        "&ws=https%3A%2F%2Fb.example%2Ffiles%2F&x.pe=[::1]:6881&x.pe=c.example:7000"
    )
    assert magnet.trackers == ("udp://a.example:1",)
    assert magnet.web_seeds == ("https://b.example/files/",)
    assert magnet.peers == ("[::1]:6881", "c.example:7000")


def test_decodes_a_tracker_encoded_twice() -> None:
    magnet = parse_magnet(f"magnet:?xt=urn:btih:{HASH}&tr=udp%253A%252F%252Fa.example%253A1")
    assert magnet.trackers == ("udp://a.example:1",)
    assert "twice" in magnet.repairs[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no magnet link"),
        ("https://example.com/", "no magnet link"),
        ("magnet:?dn=name", "no xt="),
        (f"magnet:?xt=urn:btih:{HASH[:-1]}", "damaged"),
        (f"magnet:?xt=urn:btih:{HASH[:-1]}g", "damaged"),
        (f"magnet:?xt=urn:btmh:1220{V2[:-2]}", "damaged"),
        (f"magnet:?xt=urn:sha1:{HASH}", "no xt="),
        (f"magnet:?xt=urn:btih:{HASH}&xt=urn:btih:{'0' * 40}", "two torrents"),
        ("magnet:?xt=urn:btih:" + "a" * 70_000, "characters"),
    ],
)
def test_refuses_links_beyond_repair(text: str, reason: str) -> None:
    with pytest.raises(MagnetError, match=reason):
        parse_magnet(text)


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_with_a_magnet_error(text: str) -> None:
    for candidate in (text, f"magnet:?xt=urn:btih:{HASH}&{text}"):
        try:
            magnet = parse_magnet(candidate)
        except MagnetError:
            continue
        assert len(magnet.info_hash) in (40, 64)


hosts = st.from_regex(r"[a-z][a-z0-9]{0,8}\.example", fullmatch=True)
ports = st.integers(1024, 65535)


@given(
    name=st.text(st.characters(categories=("L", "N", "P")), max_size=20),
    trackers=st.lists(st.tuples(hosts, ports), max_size=3, unique=True),
    peers=st.lists(st.tuples(hosts, ports), max_size=3, unique=True),
    hashes=st.sampled_from([(HASH, ""), (V2, ""), (HASH, V2)]),
)
def test_reads_its_own_links_back_without_repairs(
    name: str,
    trackers: list[tuple[str, int]],
    peers: list[tuple[str, int]],
    hashes: tuple[str, str],
) -> None:
    magnet = Magnet(
        info_hash=hashes[0],
        info_hash_v2=hashes[1],
        name=name,
        trackers=tuple(f"udp://{host}:{port}/announce" for host, port in trackers),
        web_seeds=("https://seed.example/a%20b/",),
        peers=tuple(f"{host}:{port}" for host, port in peers),
    )
    assert parse_magnet(magnet.uri()) == magnet


@pytest.mark.parametrize(
    "text", ["host", "host:", ":80", "host:0", "host:65536", "::1:80", "a b:1"]
)
def test_split_peer_refuses_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"HOST:PORT"):
        split_peer(text)


def test_split_peer_takes_names_and_both_address_families() -> None:
    assert split_peer("10.0.0.7:6881") == ("10.0.0.7", 6881)
    assert split_peer("[2001:db8::1]:80") == ("2001:db8::1", 80)
    assert split_peer("node-1.lan:6881") == ("node-1.lan", 6881)
