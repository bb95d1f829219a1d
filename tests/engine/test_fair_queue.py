"""The model that has been served least is next; idle models accumulate no credit."""

from qsun.engine.fair_queue import FairQueue
from qsun.engine.requests import Request


def request(model, number=0):
    return Request(f"{model}{number}", model, (1,))


def served(queue, count, cost):
    """Models in the order in which they are served, each paying what its requests cost."""
    order = []
    for _ in range(count):
        one = queue.next()
        queue.take(one)
        queue.charge(one.model, cost[one.model])
        order.append(one.model)
    return order


def test_first_come_first_served_within_a_model():
    queue = FairQueue()
    for number in range(3):
        queue.add(request("a", number), set())
    assert [queue.next().id] == ["a0"]
    queue.take(queue.next())
    assert queue.next().id == "a1"
    assert len(queue) == queue.waiting("a") == 2


def test_tokens_are_shared_out_evenly_whatever_the_number_of_requests():
    queue = FairQueue()
    for number in range(40):
        queue.add(request("burst", number), set())
        if number < 10:
            queue.add(request("dear", number), set())
    order = served(queue, 16, {"burst": 10, "dear": 30})
    assert order.count("burst") == 3 * order.count("dear")


def test_idle_time_earns_no_credit():
    queue = FairQueue()
    for number in range(20):
        queue.add(request("busy", number), set())
    served(queue, 10, {"busy": 100})
    for number in range(10):
        queue.add(request("late", number), {"busy"})
    order = served(queue, 10, {"busy": 100, "late": 100})
    assert 4 <= order.count("busy") <= 6


def test_nobody_makes_up_for_what_was_served_while_the_others_were_away():
    """a alone was served 10,000 tokens before the queue was idle; b, new, does not go first until it has as many."""
    queue = FairQueue()
    queue.add(request("a"), set())
    served(queue, 1, {"a": 10_000})
    for number in range(10):
        queue.add(request("b", number), set())
    for number in range(10):
        queue.add(request("a", number), set())
    order = served(queue, 10, {"a": 100, "b": 100})
    assert 4 <= order.count("a") <= 6


def test_a_request_can_be_taken_from_the_middle_and_an_empty_queue_has_none():
    queue = FairQueue()
    waiting = [request("a", number) for number in range(3)]
    for one in waiting:
        queue.add(one, set())
    queue.take(waiting[1])
    assert [one.id for one in queue] == ["a0", "a2"]
    queue.take(waiting[0])
    queue.take(waiting[2])
    assert queue.next() is None
    queue.forget("a")
