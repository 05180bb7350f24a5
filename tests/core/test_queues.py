"""Who waits, prefills, decodes or migrates on one worker, and the room that is left for others."""

from __future__ import annotations

from unittest.mock import Mock

from test_scheduler import answer, make_scheduler, make_sequence, rows, run_until_preempted

from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route


def start(scheduler: Scheduler, *seqs: Sequence) -> None:
    """Let sequences decode."""
    for seq in seqs:
        scheduler.add(seq)
    answer(scheduler, scheduler.schedule().batch)


def test_sequences_wait_in_order_of_rank() -> None:
    scheduler = make_scheduler()
    seqs = [make_sequence(i, 3) for i in range(3)]
    seqs[2].rank = (-1, 2, 2)
    for seq in (seqs[1], seqs[0], seqs[2]):
        scheduler.add(seq)
    assert list(scheduler.queues.waiting) == [seqs[2], seqs[0], seqs[1]]


def test_tokens_that_wait_are_counted_until_they_are_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    seq = make_sequence(0, 20)
    scheduler.add(seq)
    counts = [scheduler.queues.num_waiting_tokens]
    first, second = scheduler.schedule().batch, scheduler.schedule().batch
    for batch in (first, second):
        counts.append(scheduler.queues.num_waiting_tokens)
        answer(scheduler, batch)
    assert [*counts, scheduler.queues.num_waiting_tokens] == [20, 20, 12, 4]
    scheduler.remove(seq)
    assert scheduler.queues.num_waiting_tokens == 0
    scheduler.add(make_sequence(1, 20))
    assert scheduler.queues.num_waiting_tokens == 4, "16 tokens of the aborted prompt are in the cache"
    scheduler.check_integrity()


def test_the_load_is_what_it_serves_and_what_is_bound_for_it() -> None:
    scheduler = make_scheduler(num_blocks=21, max_num_seqs=4)
    start(scheduler, make_sequence(0, 6))
    scheduler.add(make_sequence(1, 9))
    scheduler.queues.expect(2)
    table, _ = scheduler.queues.reserve(7, [])  # of one of the two that are expected
    load = scheduler.snapshot()
    assert (load.num_decoding, load.num_context_tokens, load.num_waiting_tokens) == (1, 6, 9 - 4)
    assert (load.num_seqs, load.max_num_seqs, load.num_bound) == (2, 4, 4)
    assert (load.num_free_tokens, load.num_usable_tokens) == (80 - 4 * (2 + 2), 80)
    assert scheduler.load == 4
    scheduler.queues.cancel_reservation(table)
    scheduler.queues.expect(-2)
    assert scheduler.load == 2


def test_a_reservation_leaves_each_decoding_sequence_one_block() -> None:
    scheduler = make_scheduler(num_blocks=7)
    start(scheduler, make_sequence(0, 3))  # has one block of six
    assert scheduler.queues.reserve(16, []) is None, "five blocks, of five"
    table, num_there = scheduler.queues.reserve(15, [])
    assert (len(table), num_there) == (4, 0)


def test_all_room_is_kept_for_the_first_sequence_that_was_swapped_out() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5, enable_prefix_caching=False)
    (oldest, *_, last), _ = run_until_preempted(scheduler)
    scheduler.remove(oldest)  # now there is room
    assert scheduler.queues.keeps_room
    assert scheduler.queues.reserve(1, []) is None
    scheduler.remove(last)
    assert not scheduler.queues.keeps_room
    assert scheduler.queues.reserve(1, []) is not None


def test_who_is_turned_away_asks_again_behind_the_next_step() -> None:
    scheduler = make_scheduler(num_blocks=4)
    start(scheduler, make_sequence(0, 3))
    assert scheduler.queues.reserve(12, []) is None
    assert scheduler.queues.has_turned_away
    answer(scheduler, scheduler.schedule().batch)
    assert not scheduler.queues.has_turned_away
    scheduler.queues.turn_away()
    assert scheduler.queues.has_turned_away


def test_a_migrating_sequence_has_its_place_and_gets_its_tokens_but_decodes_no_further() -> None:
    scheduler = make_scheduler()
    seq, other = make_sequence(0, 3), make_sequence(1, 3)
    start(scheduler, seq, other)
    batch = scheduler.schedule().batch
    scheduler.queues.migrate(seq)
    assert (seq.status, scheduler.queues.num_seqs) == (SequenceStatus.MOVING, 2)
    assert rows(scheduler.schedule().batch) == [(other.slot, 4, 1, rows(batch)[0][3])]
    assert not scheduler.residency.is_drained(seq)
    answer(scheduler, batch)
    assert scheduler.residency.is_drained(seq)
    scheduler.residency.slots.sync(seq)
    assert seq.output_token_ids == [5, 5]
    scheduler.queues.keep(seq)
    assert seq.status is SequenceStatus.RUNNING
    assert len(rows(scheduler.schedule().batch)) == 2
    scheduler.check_integrity()


def test_a_sequence_whose_prompt_is_done_leaves_for_its_decode_worker() -> None:
    scheduler = make_scheduler(role="prefill")
    seq = make_sequence(0, 6, route=Route(0, 1))
    scheduler.add(seq)
    outcome = answer(scheduler, scheduler.schedule().batch)
    assert (outcome.advanced, outcome.prefilled) == ([(seq, 6)], [seq])
    assert scheduler.queues.migrating == [seq]
    assert scheduler.schedule().batch is None


def test_a_child_is_forked_only_when_all_it_shares_has_been_computed() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    parent, child, late = (make_sequence(i, 6) for i in range(3))
    scheduler.add(parent)
    batch = scheduler.schedule().batch
    assert not scheduler.queues.fork(parent, child), "its prompt is in flight"
    answer(scheduler, batch)
    scheduler.residency.slots.sync(parent)
    child.token_ids, late.token_ids = list(parent.token_ids), list(parent.token_ids)
    assert scheduler.queues.fork(parent, child)
    assert child.num_cached_tokens == 5
    assert not scheduler.queues.fork(parent, late), "no place"
    assert scheduler.queues.has_turned_away


def test_a_sequence_that_waits_for_the_choice_of_its_token_gives_way_when_others_lack_room() -> None:
    scheduler = make_scheduler(num_blocks=4)
    seq = make_sequence(0, 9)
    seq.chooser, seq.is_watched = Mock(), True
    start(scheduler, seq)
    assert seq.awaits_choice
    assert scheduler.schedule().preempted == [], "nobody lacks room"
    scheduler.queues.turn_away()
    assert scheduler.schedule().preempted == [seq]
    assert scheduler.residency.blocks.num_free == 3


def test_a_worker_that_may_not_decode_swaps_nothing_out() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5, enable_prefix_caching=False)
    scheduler.set_role(Role.PREFILL)
    (*_, last), batch = run_until_preempted(scheduler)
    assert (len(batch.copies), last.host_table, last.num_swapped) == (0, [], 0)
