"""Slots and blocks of one worker: parked, swapped and published ones, step by step."""

from __future__ import annotations

from test_scheduler import answer, make_scheduler, make_sequence, rows, run_until_preempted


def test_what_leaves_is_parked_until_the_last_step_that_may_name_it_is_done() -> None:
    scheduler = make_scheduler()
    residency = scheduler.residency
    seq, other = make_sequence(0, 6), make_sequence(1, 3)
    for s in (seq, other):
        scheduler.add(s)
    batches = [scheduler.schedule().batch for _ in range(3)]
    num_free, slot = residency.slots.num_free, seq.slot
    scheduler.remove(seq)
    assert residency.num_parked_blocks == 2
    batches.append(scheduler.schedule().batch)
    assert slot not in batches[-1].row_slots
    for batch in batches[:2]:
        answer(scheduler, batch)
        assert (residency.num_parked_blocks, residency.slots.num_free) == (2, num_free)
        scheduler.check_integrity()
    answer(scheduler, batches[2])
    assert (residency.num_parked_blocks, residency.slots.num_free) == (0, num_free + 1)


def test_a_parked_slot_is_not_given_to_another_sequence() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    old, new = make_sequence(0, 3), make_sequence(1, 3)
    scheduler.add(old)
    batch = scheduler.schedule().batch
    slot = old.slot
    scheduler.remove(old)
    scheduler.add(new)
    later = scheduler.schedule().batch
    assert later is None or new.slot != slot
    answer(scheduler, batch)
    assert new.output_token_ids == []


def test_nothing_is_parked_where_no_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    seq = make_sequence(0, 6)
    scheduler.add(seq)
    answer(scheduler, scheduler.schedule().batch)
    scheduler.remove(seq)
    assert not scheduler.residency.num_parked_blocks
    assert scheduler.residency.blocks.num_free == scheduler.residency.blocks.num_usable


def test_tokens_that_were_swapped_out_count_as_there() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5, enable_prefix_caching=False)
    (*_, last), _ = run_until_preempted(scheduler)
    assert last.num_expected_cached == last.num_swapped == 9
    assert scheduler.queues.num_waiting_tokens == last.num_tokens - 9 == 1


def test_only_full_blocks_of_computed_tokens_are_published() -> None:
    scheduler = make_scheduler()
    seq, next_turn = make_sequence(0, 7), make_sequence(1, 7)
    scheduler.add(seq)
    first, second = scheduler.schedule().batch, scheduler.schedule().batch
    answer(scheduler, first)
    assert seq.num_published_blocks == 1
    scheduler.residency.slots.sync(seq)
    next_turn.token_ids = [*seq.token_ids, 1]  # 7 + 1 + 1: the eighth token is in flight
    assert scheduler.num_cached(next_turn) == 4
    answer(scheduler, second)
    scheduler.remove(seq)
    assert scheduler.num_cached(next_turn) == 8
    assert scheduler.residency.find(next_turn.block_keys, 8) == scheduler.residency.find(next_turn.block_keys, 5)


def test_a_sequence_with_logprobs_of_its_prompt_finds_nothing() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence(0, 9), make_sequence(1, 9, prompt_logprobs=1)
    scheduler.add(first)
    answer(scheduler, scheduler.schedule().batch)
    scheduler.add(second)
    assert (second.slot, rows(scheduler.schedule().batch)[-1][1:3]) == (None, (0, 9)) or second.num_cached_tokens == 0


def test_the_most_tokens_of_a_sequence_that_drains() -> None:
    scheduler = make_scheduler()
    seq = make_sequence(0, 3)
    scheduler.add(seq)
    batches = [scheduler.schedule().batch for _ in range(3)]
    answer(scheduler, batches[0])
    assert scheduler.residency.drained_len(seq) == 6
    for batch in batches[1:]:
        answer(scheduler, batch)
    scheduler.residency.slots.sync(seq)
    assert (seq.num_tokens, scheduler.residency.is_drained(seq)) == (6, True)


def test_a_dead_workers_sequences_hold_nothing_there() -> None:
    scheduler = make_scheduler()
    named, idle = make_sequence(0, 9), make_sequence(1, 3)
    for seq in (named, idle):
        scheduler.add(seq)
    answer(scheduler, scheduler.schedule().batch)
    scheduler.remove(idle)
    scheduler.schedule()
    assert scheduler.die() == [named]
    scheduler.residency.abandon(named)
    assert (named.slot, named.block_table, named.num_tokens) == (None, [], 10)
