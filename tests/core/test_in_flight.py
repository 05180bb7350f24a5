"""The ledger of what workers have been sent and have not answered, on a clock that the tests set."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanopd.core.in_flight import LEAD_S, MAX_GAP_S, Ledger, WorkerLedger
from nanopd.messages import StepBatch, StepResult, TransferAck, TransferPlan

NONE, NO_FLOATS = np.empty(0, np.int32), np.empty(0, np.float32)


def step(step_id: int) -> StepBatch:
    return StepBatch(step_id, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE)


def result(step_id: int, duration_us: int = 1000) -> StepResult:
    return StepResult(step_id, duration_us, NONE, NONE, NONE, NO_FLOATS)


def plan(plan_id: int) -> TransferPlan:
    return TransferPlan(plan_id, 0, 0, 1, 0, NONE, NONE)


def test_each_answer_belongs_to_the_message_before_it() -> None:
    ledger = WorkerLedger()
    steps, plans = [step(i) for i in (1, 2)], [plan(i) for i in (1, 2)]
    for message in (*steps, *plans):
        ledger.sent(message, 1.0)
    assert ledger.answered(TransferAck(2, 5, 0), 2.0) is plans[1], "plans may be answered in any order"
    assert ledger.answered(result(1), 2.0) is steps[0]
    assert ledger.answered(TransferAck(9, 5, 0), 2.0) is None
    assert ledger.answered(result(2), 2.0) is steps[1]


def test_an_answer_is_owed_since_the_oldest_message_or_the_last_answer() -> None:
    ledger = WorkerLedger()
    assert ledger.since_s == math.inf
    ledger.sent(step(1), 1.0)
    ledger.sent(step(2), 2.0)
    ledger.sent(plan(1), 3.0)
    assert ledger.since_s == 1.0
    ledger.answered(result(1), 4.0)
    assert ledger.since_s == 3.0, "the plan has waited for longer now"
    ledger.answered(TransferAck(1, 5, 0), 5.0)
    assert ledger.since_s == 4.0
    ledger.answered(result(2), 6.0)
    assert ledger.since_s == math.inf


def test_busy_time_is_that_of_steps() -> None:
    ledger = WorkerLedger()
    for i in range(3):
        ledger.sent(step(i), 0.0)
        ledger.answered(result(i, duration_us=700), 1.0)
    ledger.sent(plan(1), 1.0)
    ledger.answered(TransferAck(1, 5000, 0), 2.0)
    assert ledger.busy_us == 2100
    ledger.reset_busy()
    assert ledger.busy_us == 0


def test_the_next_step_is_due_before_the_one_under_way_ends() -> None:
    ledger = WorkerLedger()
    ledger.sent(step(1), 10.0)
    assert ledger.next_step_s == 10.0 - LEAD_S, "nothing is known of its steps: at once"
    ledger.sent(step(2), 10.01)  # behind it: does not begin so far
    ledger.answered(result(1, duration_us=40_000), 10.04)
    assert ledger.next_step_s == pytest.approx(10.08 - LEAD_S)
    ledger.answered(result(2, duration_us=50_000), 10.09)
    ledger.sent(step(3), 20.0)  # to an idle worker: begins now
    assert ledger.next_step_s == pytest.approx(20.05 - LEAD_S)


def test_nothing_is_owed_by_a_dead_worker() -> None:
    ledger = Ledger(2, timeout_s=1.0)
    for message in (step(1), plan(1)):
        ledger.of_worker[0].sent(message, 0.0)
    ledger.of_worker[0].forget()
    assert ledger.of_worker[0].since_s == math.inf
    assert ledger.overdue(0.5) == [] == ledger.overdue(3.0)
    assert ledger.of_worker[0].answered(TransferAck(1, 5, 0), 3.0) is None


def test_workers_are_overdue_after_the_time_limit() -> None:
    ledger = Ledger(3, timeout_s=1.0)
    assert ledger.next_due_s() == math.inf
    assert ledger.overdue(0.0) == []
    ledger.of_worker[2].sent(step(1), 0.0)
    ledger.of_worker[1].sent(plan(1), 0.5)
    assert ledger.next_due_s() == 1.0
    assert [ledger.overdue(now_s) for now_s in (0.99, 1.0, 1.49, 1.5)] == [[], [2], [2], [1, 2]]
    ledger.of_worker[2].answered(result(1), 1.6)
    assert ledger.overdue(1.7) == [1]


def test_a_process_that_was_stopped_does_not_take_its_workers_for_hung() -> None:
    """Nobody has looked for long: time counts from now on, and only then runs out."""
    ledger = Ledger(1, timeout_s=1.0)
    ledger.overdue(0.0)
    ledger.of_worker[0].sent(step(1), 0.0)
    ledger.of_worker[0].sent(plan(1), 0.0)
    back_s = MAX_GAP_S + 0.1
    assert ledger.overdue(back_s) == []
    assert ledger.next_due_s() == back_s + 1.0
    assert ledger.overdue(back_s + 0.99) == []
    assert ledger.overdue(back_s + 1.0) == [0]


def test_a_gap_below_the_limit_is_no_excuse() -> None:
    ledger = Ledger(1, timeout_s=1.0)
    ledger.overdue(0.0)
    ledger.of_worker[0].sent(step(1), 0.0)
    assert ledger.overdue(MAX_GAP_S) == [0]
