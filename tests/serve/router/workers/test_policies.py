"""Which worker takes a request."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun.errors import QsunError
from qsun.serve.router.workers.policies import Demand, PowerOfTwo, make_policy, partition

NAMES = ("least_outstanding_tokens", "power_of_two", "round_robin", "partitioned", "prefix_affinity")


@dataclass
class Load:
    url: str
    outstanding_tokens: int = 0
    taken: int = 0
    models: frozenset[str] | None = None


def loads(*tokens):
    return [Load(f"http://w{number}", count) for number, count in enumerate(tokens)]


@pytest.mark.parametrize("name", NAMES)
def test_no_worker_is_none_and_one_worker_takes_all(name):
    assert make_policy(name).choose([], Demand("math", 1)) is None
    (only,) = loads(10**6)
    assert make_policy(name).choose([only], Demand("math", 1)) is only


def test_the_least_loaded_takes_it_and_equals_take_turns():
    policy = make_policy("least_outstanding_tokens")
    assert policy.choose(loads(30, 10, 20), Demand("math", 5)).url == "http://w1"
    workers = loads(0, 0, 0)
    for _ in range(9):
        policy.choose(workers, Demand("math", 5)).taken += 1
    assert [worker.taken for worker in workers] == [3, 3, 3]


def test_power_of_two_never_takes_the_most_loaded_of_three_and_uses_all_others():
    policy, workers = PowerOfTwo(seed=0), loads(5, 9, 7)
    chosen = Counter(policy.choose(workers, Demand("math", 1)).url for _ in range(300))
    assert set(chosen) == {"http://w0", "http://w2"}
    assert 170 < chosen["http://w0"] < 230  # of the three pairs it wins two


def test_round_robin_goes_on_where_a_worker_is_missing_for_a_while():
    policy, workers = make_policy("round_robin"), loads(9, 0, 5)
    order = [policy.choose(workers, Demand("math", 1)).url[-1] for _ in range(4)]
    order += [policy.choose([workers[0], workers[2]], Demand("math", 1)).url[-1] for _ in range(3)]
    order += [policy.choose(workers, Demand("math", 1)).url[-1] for _ in range(2)]
    assert "".join(order) == "0120" + "202" + "10"


def test_partitioned_serves_a_model_with_its_own_workers_only():
    policy, workers = make_policy("partitioned"), loads(100, 0, 7)
    for worker, model in zip(workers, ("math", "code", "math"), strict=True):
        worker.models = frozenset([model])
    assert policy.choose(workers, Demand("math", 1)).url == "http://w2"
    assert policy.choose(workers[1:2], Demand("math", 1)) is None


def test_partition_gives_each_model_the_same_number_of_workers_or_one_more():
    assigned = partition(list("abcdefg"), ["math", "code", "tool"])
    shares = Counter(model for models in assigned.values() for model in models)
    assert shares == {"math": 3, "code": 2, "tool": 2}


def test_an_unknown_policy():
    with pytest.raises(QsunError, match=r"'random' is unknown; use one of least_outstanding_tokens, power_of_two"):
        make_policy("random")


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=200),
    count=st.integers(1, 8),
)
def test_least_outstanding_tokens_keeps_workers_within_one_request_of_each_other(requests, count):
    """Without departures no two workers differ by more than the largest request: the bound of list scheduling."""
    policy, workers = make_policy("least_outstanding_tokens"), loads(*[0] * count)
    for tokens, _ in requests:
        chosen = policy.choose(workers, Demand("math", tokens))
        chosen.outstanding_tokens += tokens
        chosen.taken += 1
    sums = [worker.outstanding_tokens for worker in workers]
    assert max(sums) - min(sums) <= max(tokens for tokens, _ in requests)


def worker_names(chosen):
    return [worker.url for worker in chosen]


def test_prefix_affinity_keeps_a_beginning_at_one_worker():
    workers = loads(0, 0, 0, 0)
    policy = make_policy("prefix_affinity")
    demands = [Demand("math", 10, f"beginning {i}") for i in range(64)]
    first = worker_names(policy.choose(workers, demand) for demand in demands)
    assert first == worker_names(make_policy("prefix_affinity").choose(workers[::-1], demand) for demand in demands)
    assert len(set(first)) == 4
    left = worker_names(policy.choose(workers[:3], demand) for demand in demands)
    assert all(now == before for now, before in zip(left, first, strict=True) if before != "http://w3")


def test_prefix_affinity_tells_workers_apart_whose_urls_begin_alike():
    host = "prefill-math-0.prefill-math.a-namespace-of-kubernetes.svc.cluster.local"
    workers = [Load(f"http://{host}:{port}") for port in range(8000, 8004)]
    policy = make_policy("prefix_affinity")
    assert set(worker_names(policy.choose(workers, Demand("math", 1, f"beginning {i}")) for i in range(64))) == set(
        worker_names(workers)
    )


def test_prefix_affinity_yields_to_load():
    workers = loads(0, 0)
    policy = make_policy("prefix_affinity")
    demand = Demand("math", 10, "beginning")
    claimant = policy.choose(workers, demand)
    claimant.outstanding_tokens = policy.slack_tokens
    assert policy.choose(workers, demand) is claimant
    claimant.outstanding_tokens += 1
    assert policy.choose(workers, demand) is not claimant
    assert policy.choose([], demand) is None
