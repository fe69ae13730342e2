import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libtorrent
import pytest

from magnetar.errors import PortInUseError, ReleaseError
from magnetar.fetcher.torrent.add_params import read_resume
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.events import (
    BadPiece,
    Checked,
    Event,
    Flushed,
    MetadataArrived,
    PeerConnected,
    Removed,
    ResumeData,
)
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.metainfo import Metainfo, TorrentFile, parse_metainfo
from magnetar.fetcher.torrent.session import (
    SessionSettings,
    TorrentJob,
    TorrentStatus,
    listening_address,
)

PIECE = 16_384
LOOPBACK = SessionSettings(listen="127.0.0.1:0", utp=False, dht=False)


def wait_for(session: LibtorrentSession, kind: type[Event]) -> Event:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        for event in session.poll(0.1):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__}")


def wait_until(session: LibtorrentSession, ready: Callable[[TorrentStatus], bool]) -> TorrentStatus:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        session.poll(0.1)
        status = session.status()
        if status is not None and ready(status):
            return status
    raise AssertionError(f"not ready: {session.status()}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source" / "release"
    folder.mkdir(parents=True)
    for i, name in enumerate(("a.txt", "b.bin", "c.txt")):
        (folder / name).write_bytes(bytes(j * (7 + i) % 251 for j in range(50_000)))
    return folder


def torrent_of(folder: Path, kind: str) -> Metainfo:
    if kind == "v1":
        return parse_metainfo(create_torrent(folder, piece_length=PIECE))
    flags = libtorrent.create_torrent.v2_only if kind == "v2" else 0
    creator = libtorrent.create_torrent(libtorrent.list_files(str(folder)), PIECE, flags)
    libtorrent.set_piece_hashes(creator, str(folder.parent))
    return parse_metainfo(libtorrent.bencode(creator.generate()))


@pytest.fixture
def session() -> Iterator[LibtorrentSession]:
    session = LibtorrentSession(LOOPBACK)
    yield session
    session.close()


@pytest.mark.parametrize("kind", ["v1", "hybrid", "v2"])
def test_metadata_then_exactly_the_wanted_pieces_then_resume(
    tmp_path: Path, folder: Path, session: LibtorrentSession, kind: str
) -> None:
    metainfo = torrent_of(folder, kind)
    seeder = LibtorrentSession(LOOPBACK)
    address = listening_address(seeder)
    seeder.add(
        TorrentJob(
            info_hash=metainfo.info_hash, save_path=folder.parent, metainfo=metainfo, is_seed=True
        )
    )
    wait_for(seeder, Checked)
    job = TorrentJob(info_hash=metainfo.info_hash, save_path=tmp_path / "data", peers=(address,))
    session.add(job)
    arrived = wait_for(session, MetadataArrived)
    assert isinstance(arrived, MetadataArrived)
    assert metainfo.raw.startswith(b"d4:info" + arrived.info)
    session.remove()
    wait_for(session, Removed)

    wanted = metainfo.pieces(metainfo.file("release/b.bin"))
    priorities = [4 if piece in wanted else 0 for piece in range(metainfo.num_pieces)]
    job = dataclasses.replace(
        job,
        metainfo=metainfo,
        piece_priorities=priorities,
        unwanted=("release/a.txt", "release/c.txt"),
    )
    session.add(job)
    wait_for(session, Checked)
    wait_until(
        session,
        lambda status: len(status.have) > 0 and all(status.have[piece] for piece in wanted),
    )
    session.flush()
    wait_for(session, Flushed)
    status = wait_until(session, lambda status: sum(status.have) == len(wanted))
    assert status.downloaded_bytes <= len(wanted) * PIECE
    saved = tmp_path / "data" / "release"
    assert [path.name for path in saved.iterdir()] == ["b.bin"]
    assert (saved / "b.bin").read_bytes() == (folder / "b.bin").read_bytes()

    session.request_resume_data()
    resume = wait_for(session, ResumeData)
    assert isinstance(resume, ResumeData)
    session.remove()
    wait_for(session, Removed)
    seeder.close()
    session.add(dataclasses.replace(job, resume=resume.data, known=wanted, peers=()))
    wait_for(session, Checked)
    status = wait_until(session, lambda status: status.state == "active")
    assert [piece for piece, there in enumerate(status.have) if there] == list(wanted)


@pytest.mark.parametrize("kind", ["v1", "hybrid", "v2"])
def test_a_check_after_a_crash_finds_what_a_magnet_brought(
    tmp_path: Path, folder: Path, session: LibtorrentSession, kind: str
) -> None:
    whole = torrent_of(folder, kind)
    # A magnet brings the info dictionary alone, and of version 2 no hashes of pieces.
    info_end = whole.raw.index(b"12:piece layers") if kind != "v1" else -1
    metainfo = parse_metainfo(whole.raw[:info_end] + b"e")
    seeder = LibtorrentSession(LOOPBACK)
    address = listening_address(seeder)
    seeder.add(
        TorrentJob(info_hash=whole.info_hash, save_path=folder.parent, metainfo=whole, is_seed=True)
    )
    wait_for(seeder, Checked)
    wanted = metainfo.pieces(metainfo.file("release/b.bin"))
    job = TorrentJob(
        info_hash=metainfo.info_hash,
        save_path=tmp_path / "data",
        metainfo=metainfo,
        peers=(address,),
        piece_priorities=[4 * (piece in wanted) for piece in range(metainfo.num_pieces)],
    )
    session.add(job)
    wait_until(session, lambda status: sum(status.have) == len(wanted))
    session.request_resume_data()
    resume = wait_for(session, ResumeData)
    assert isinstance(resume, ResumeData)
    session.remove()
    wait_for(session, Removed)
    seeder.close()

    path = tmp_path / "data" / "release" / "b.bin"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    job = dataclasses.replace(job, peers=(), resume=resume.data)
    session.add(job)
    wait_for(session, Checked)
    status = wait_until(session, lambda status: status.state == "active")

    assert [piece for piece, there in enumerate(status.have) if there] == list(wanted)[:-1]


def test_resume_data_cut_anywhere_means_a_check(
    tmp_path: Path, folder: Path, session: LibtorrentSession
) -> None:
    metainfo = torrent_of(folder, "v1")
    job = TorrentJob(info_hash=metainfo.info_hash, save_path=folder.parent, metainfo=metainfo)
    session.add(job)
    wait_for(session, Checked)
    session.request_resume_data()
    resume = wait_for(session, ResumeData)
    assert isinstance(resume, ResumeData)
    for length in range(len(resume.data)):
        assert read_resume(resume.data[:length], libtorrent) is None
    session.remove()
    wait_for(session, Removed)

    session.add(dataclasses.replace(job, resume=resume.data[: len(resume.data) // 2]))
    wait_for(session, Checked)
    assert all(wait_until(session, lambda status: status.state == "active").have)


@pytest.mark.parametrize("kind", ["v1", "hybrid", "v2"])
def test_found_pieces_are_hashed_and_known_ones_are_not(
    tmp_path: Path, folder: Path, session: LibtorrentSession, kind: str
) -> None:
    (folder / "b.bin").write_bytes(bytes(range(256)) * 700)
    metainfo = torrent_of(folder, kind)
    known, *found = metainfo.pieces(metainfo.file("release/b.bin"))
    data = bytearray((folder / "b.bin").read_bytes())
    data[0] ^= 1  # Nobody looks at the known piece.
    data[5 * PIECE] ^= 1
    (folder / "b.bin").write_bytes(data)
    session.add(
        TorrentJob(
            info_hash=metainfo.info_hash,
            save_path=folder.parent,
            metainfo=metainfo,
            piece_priorities=[0] * metainfo.num_pieces,
            known=(known,),
            found={piece: (True,) for piece in found},
        )
    )
    bad = wait_for(session, BadPiece)
    assert isinstance(bad, BadPiece)
    assert bad.piece in (known + 5, known + 4)
    wait_until(
        session,
        lambda status: (
            [piece for piece, there in enumerate(status.have) if there]
            == [piece for piece in (known, *found) if piece != bad.piece]
        ),
    )


def test_resume_data_of_another_torrent_are_not_taken(
    tmp_path: Path, folder: Path, session: LibtorrentSession
) -> None:
    first = torrent_of(folder, "v1")
    session.add(TorrentJob(info_hash=first.info_hash, save_path=folder.parent, metainfo=first))
    wait_for(session, Checked)
    session.request_resume_data()
    resume = wait_for(session, ResumeData)
    assert isinstance(resume, ResumeData)
    session.remove()
    wait_for(session, Removed)
    (folder / "c.txt").write_bytes(b"another torrent" * 3000)
    second = torrent_of(folder, "v1")
    pieces = range(second.num_pieces)
    session.add(
        TorrentJob(
            info_hash=second.info_hash,
            save_path=tmp_path / "empty",
            metainfo=second,
            begun=pieces,
            known=(),
            resume=resume.data,
        )
    )
    wait_for(session, Checked)
    status = wait_until(session, lambda status: status.state == "active")
    assert list(status.have) == [False] * second.num_pieces


def test_begins_afresh_with_what_is_there_and_lets_nobody_in_who_is_barred(
    tmp_path: Path, folder: Path, session: LibtorrentSession
) -> None:
    metainfo = torrent_of(folder, "v1")
    seeder = LibtorrentSession(dataclasses.replace(LOOPBACK, listen="127.0.0.2:0"))
    address = listening_address(seeder)
    seeder.add(
        TorrentJob(
            info_hash=metainfo.info_hash, save_path=folder.parent, metainfo=metainfo, is_seed=True
        )
    )
    wait_for(seeder, Checked)
    first = [4] * 3 + [0] * (metainfo.num_pieces - 3)
    session.add(
        TorrentJob(
            info_hash=metainfo.info_hash,
            save_path=tmp_path / "data",
            metainfo=metainfo,
            piece_priorities=first,
            peers=(address,),
        )
    )
    wait_for(session, Checked)
    before = wait_until(session, lambda status: sum(status.have) == 3)
    session.bar([address[0]])
    session.begin_afresh()
    wait_for(session, Checked)
    after = wait_until(session, lambda status: status.state == "active")
    assert after.have == before.have
    assert after.downloaded_bytes == before.downloaded_bytes == 3 * PIECE
    session.prioritize([4] * metainfo.num_pieces)
    session.connect([address])
    events = [event for _ in range(8) for event in session.poll(0.1)]
    assert not any(isinstance(event, PeerConnected) for event in events)
    assert session.peers() == []
    session.bar(())
    session.ask_at_most(2)
    session.connect([address])
    wait_until(session, lambda status: all(status.have))
    assert (tmp_path / "data/release/b.bin").read_bytes() == (folder / "b.bin").read_bytes()
    seeder.close()


def test_recheck_finds_the_damaged_piece(
    tmp_path: Path, folder: Path, session: LibtorrentSession
) -> None:
    metainfo = torrent_of(folder, "v1")
    session.add(
        TorrentJob(info_hash=metainfo.info_hash, save_path=folder.parent, metainfo=metainfo)
    )
    wait_for(session, Checked)
    status = wait_until(session, lambda status: status.state == "active")
    assert all(status.have)
    data = bytearray((folder / "b.bin").read_bytes())
    data[20_000] ^= 1
    (folder / "b.bin").write_bytes(data)
    session.recheck()
    wait_for(session, Checked)
    status = wait_until(session, lambda status: status.state == "active")
    damaged = [piece for piece, there in enumerate(status.have) if not there]
    assert damaged == list(metainfo.pieces(metainfo.file("release/b.bin"), 20_000, 1))


def test_refuses_a_torrent_that_the_library_reads_differently(
    tmp_path: Path, folder: Path, session: LibtorrentSession
) -> None:
    metainfo = torrent_of(folder, "v1")
    lie = dataclasses.replace(
        metainfo, files=(TorrentFile(path="release/other", length=150_000, offset=0),)
    )
    with pytest.raises(ReleaseError, match="other file names"):
        session.add(TorrentJob(info_hash=lie.info_hash, save_path=tmp_path, metainfo=lie))


def test_a_taken_port_is_an_error_and_not_another_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        session = LibtorrentSession(dataclasses.replace(LOOPBACK, listen=f"127.0.0.1:{port}"))
        with pytest.raises(PortInUseError, match="cannot listen"):
            listening_address(session)
        session.close()


def test_announces_itself_to_nobody(session: LibtorrentSession) -> None:
    settings = session._session.get_settings()
    for name in ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"):
        assert settings[name] is False, name
    assert settings["enable_outgoing_utp"] is False
    assert settings["upload_rate_limit"] > 0
    assert settings["download_rate_limit"] == 0
