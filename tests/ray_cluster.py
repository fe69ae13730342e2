"""Ray nodes with labels and memories of their own on this machine, in a process of their own.

``python -m magnetar.tests.ray_cluster h1=300 h2=500``: the first is the head, memories in MB. Says
the address and then stays until its stdin ends.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from magnetar.settings import data_dir


@contextlib.contextmanager
def ray_cluster(**megabytes: int) -> Iterator[str]:
    """The address of a cluster with these hosts; the environment decides its token."""
    process = subprocess.Popen(
        [sys.executable, "-m", "magnetar.tests.ray_cluster"]
        + [f"{host}={memory}" for host, memory in megabytes.items()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        lines = (line.strip() for line in process.stdout)
        address = next((line for line in lines if line.startswith("127.")), None)
        assert address is not None, "the cluster did not start"
        yield address
    finally:
        process.stdin.close()
        process.stdout.read()
        process.stdout.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster_of_commands(home: Path, **megabytes: int) -> Iterator[str]:
    """A cluster that all commands of this process may join: they share its token and `home`.

    Kernels that were compiled before for the tests need not be compiled again.
    """
    from magnetar.cluster.runtime.ray_runtime import token_file

    kernels = data_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MAGNETAR_HOME", str(home))
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(home)))
        with ray_cluster(**megabytes) as address:
            yield address


def main(hosts: list[str]) -> None:
    """Run until stdin ends."""
    from magnetar.cluster.runtime.ray_runtime import HOST_LABEL, prepare_environment

    prepare_environment()
    os.makedirs("/tmp/ray", exist_ok=True)  # Cluster() writes a file there whatever its temp_dir
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="mgt-", dir="/tmp")
    cluster = Cluster()
    try:
        for number, host in enumerate(hosts):
            label, _, memory = host.partition("=")
            cluster.add_node(
                num_cpus=1,
                memory=int(memory) * 1_000_000,
                object_store_memory=80 << 20,
                temp_dir=folder,
                # One address a node: on 127.0.0.1 it would take that of the network card.
                node_ip_address=f"127.0.0.{number + 2}",
                labels={HOST_LABEL: label},
                include_dashboard=False,
            )
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
