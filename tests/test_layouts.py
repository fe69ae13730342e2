"""Layouts of other systems: Parallax' numbers of pipelines are those that its own text names."""

from magnetar.benchmarks.layouts import parallax, pipelines_of_few_nodes
from magnetar.benchmarks.random_clusters import Cluster, profile_inventory


def test_pipelines_are_interleaved_where_one_after_the_other_gives_fewer() -> None:
    rooms = (40, 40, 20, 20, 10, 10)
    groups = pipelines_of_few_nodes(rooms, 70)
    assert [sorted(rooms[node] for node in group) for group in groups] == [[10, 20, 40]] * 2


def test_one_node_is_a_pipeline_where_it_holds_all_layers() -> None:
    assert sorted(pipelines_of_few_nodes((80, 70, 20), 70)) == [[0], [1]]
    assert pipelines_of_few_nodes((30, 30), 70) == []


def test_layouts_hold_every_layer_once_in_each_chain() -> None:
    placing = Cluster(profile_inventory(9)).placing
    chains = parallax(placing)
    assert chains
    used = [site for sites, _ in chains for site in sites]
    assert len(used) == len(set(used))
    for sites, ends in chains:
        assert len(sites) == len(ends)
        assert list(ends) == sorted(set(ends))
        assert ends[-1] == placing.problem(1).num_layers
