"""A budget that is spent by many threads and never exceeded."""

import random
import threading

from agiqa.extract.teaching.costs import Budget


def test_threads_never_spend_more_than_the_budget_and_leave_less_than_one_request():
    budget, most, spent, lock = Budget(10.0, 1.0), 0.7, [1.0], threading.Lock()

    def spend(seed):
        dice = random.Random(seed)
        while budget.reserve(most):
            cost = dice.uniform(0.0, most)
            with lock:
                spent[0] += cost
            budget.settle(most, cost)

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 10.0 - most < spent[0] <= 10.0
    assert abs(budget.spent - spent[0]) < 1e-9


def test_a_request_waits_for_one_that_may_cost_less_than_it_reserved():
    budget, allowed = Budget(1.0, 0.0), []
    assert budget.reserve(0.8)
    waiting = threading.Thread(target=lambda: allowed.append(budget.reserve(0.8)))
    waiting.start()
    budget.settle(0.8, 0.1)
    waiting.join()
    assert allowed == [True]
    budget.settle(0.8, 0.8)
    assert not budget.reserve(0.2)
    assert budget.reserve(0.05)


def test_without_a_budget_everything_is_allowed_and_counted():
    budget = Budget(None, 2.0)
    assert budget.reserve(1e9)
    budget.settle(1e9, 3.0)
    assert budget.spent == 5.0


def test_a_reserve_grows_only_as_far_as_the_budget_goes():
    budget = Budget(1.0, 0.0)
    assert budget.reserve(0.4)
    assert budget.reserve_more(0.4)
    assert not budget.reserve_more(0.4)
    budget.settle(0.8, 0.1)
    assert budget.reserve(0.9)
