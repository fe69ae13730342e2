"""Who computes what where experts lie on several hosts."""

from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.model.divide import SPLIT_ROWS, divide

NUM_HOSTS = 4
HOSTS = st.lists(
    st.sets(st.integers(0, NUM_HOSTS - 1), min_size=1).map(sorted), min_size=8, max_size=8
)


@given(st.lists(st.integers(0, 7), max_size=300), HOSTS)
def test_every_assignment_goes_to_one_host_that_has_its_expert(
    experts: list[int], hosts: list[list[int]]
) -> None:
    shares = divide(experts, hosts, num_hosts=NUM_HOSTS)
    assert len(shares) == NUM_HOSTS
    assert sorted(position for share in shares for position in share) == list(range(len(experts)))
    for host, share in enumerate(shares):
        assert share == sorted(share)
        assert all(host in hosts[experts[position]] for position in share)
    assert shares == divide(experts, hosts, num_hosts=NUM_HOSTS)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=300))
def test_where_all_hosts_have_all_experts_none_gets_much_more_than_its_share(
    experts: list[int],
) -> None:
    shares = divide(experts, [[0, 1]] * 8, num_hosts=2)
    # An expert of few rows is not split, and one of many costs a read at each of its hosts.
    largest = max(experts.count(expert) for expert in set(experts))
    assert abs(len(shares[0]) - len(shares[1])) <= max(largest, 2 * SPLIT_ROWS) + 8 * SPLIT_ROWS


def test_few_rows_of_a_copied_expert_stay_together_on_the_less_loaded_host() -> None:
    # Experts 0 and 1 are at home alone; the copies of 2 are there and on the helper.
    shares = divide([0, 1, 2, 2, 2], [[0], [0], [0, 1]], num_hosts=2)
    assert shares == [[0, 1], [2, 3, 4]]


def test_many_rows_of_a_copied_expert_are_shared() -> None:
    shares = divide([0] * 100, [[0, 1]], num_hosts=2)
    assert [len(share) for share in shares] == [50, 50]


def test_a_choice_between_equals_falls_on_the_home() -> None:
    assert divide([5], [[0, 1]] * 8, num_hosts=2) == [[0], []]
