"""What a machine has: control groups bound it, and labels fit into Ray."""

from pathlib import Path

from magnetar.cluster.inventory.inventory import (
    cgroup_folders,
    cgroup_free_bytes,
    host_label,
    num_cpus,
    probe_node,
)


def write_group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_tightest_ancestor_bounds_the_memory(tmp_path: Path) -> None:
    write_group(tmp_path, memory__max="max", memory__current="5")
    write_group(tmp_path / "outer", memory__max="1000", memory__current="900")
    write_group(tmp_path / "outer/inner", memory__max="5000", memory__current="100")
    folders = cgroup_folders(tmp_path, "0::/outer/inner\n")
    assert cgroup_free_bytes(folders) == 100


def test_page_cache_counts_as_free(tmp_path: Path) -> None:
    write_group(
        tmp_path,
        memory__max="1000",
        memory__current="900",
        memory__stat="anon 100\ninactive_file 300\nactive_file 50\n",
    )
    assert cgroup_free_bytes([tmp_path]) == 450


def test_a_v1_controller_without_a_limit_is_no_limit(tmp_path: Path) -> None:
    write_group(
        tmp_path / "memory",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="4",
    )
    assert cgroup_free_bytes(cgroup_folders(tmp_path, "3:memory:/\n")) is None


def test_a_quota_bounds_the_processors(tmp_path: Path) -> None:
    write_group(tmp_path, cpu__max="100000 100000\n")
    assert num_cpus([tmp_path]) == 1


def test_a_missing_control_group_bounds_nothing(tmp_path: Path) -> None:
    assert cgroup_free_bytes([tmp_path / "none"]) is None
    assert num_cpus([tmp_path / "none"]) >= 1


def test_probe_reports_memory_disk_and_processors_of_this_machine(tmp_path: Path) -> None:
    node = probe_node("h1", "127.0.0.1", tmp_path / "not" / "yet")
    assert node.host == "h1"
    assert node.num_cpus >= 1
    assert node.devices[0].memory_bytes > 0
    assert node.disk_free_bytes > 0


def test_limits_given_by_the_cluster_bound_memory_and_processors(tmp_path: Path) -> None:
    node = probe_node("h1", "", tmp_path, memory_limit_bytes=1000, cpu_limit=1)
    assert node.devices[0].memory_bytes == 1000
    assert node.num_cpus == 1


def test_the_host_label_fits_into_a_ray_label() -> None:
    label = host_label()
    assert 0 < len(label) <= 63
    assert label[0].isalnum()
    assert label[-1].isalnum()
