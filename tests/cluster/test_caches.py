"""Caches that groups of cores share are counted once each."""

from pathlib import Path

from magnetar.cluster.inventory.caches import last_level_cache_bytes


def test_every_group_of_cores_counts_once(tmp_path: Path) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        folder = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert last_level_cache_bytes(tmp_path) == 64 << 20


def test_who_does_not_tell_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "cpu0" / "cache" / "index3"
    folder.mkdir(parents=True)
    (folder / "size").write_text("?\n")
    (folder / "shared_cpu_list").write_text("0\n")
    assert last_level_cache_bytes(tmp_path) == last_level_cache_bytes(tmp_path / "none") == 0
