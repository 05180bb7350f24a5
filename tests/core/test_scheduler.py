"""The scheduler of one worker, step by step; results are made up, no worker and no torch."""

from __future__ import annotations

import numpy as np
import pytest

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.results import StepOutcome
from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route, RowFlag, StepBatch, StepResult
from nanopd.request import Request, SamplingParams

EOS = 2
MODEL = ModelConfig("llama", 128, 8, 8, 1, 1, 1, 8, 64, 1e-5, 1e4, eos_token_ids=(EOS,))


def make_scheduler(num_blocks: int = 100, role: str = "mixed", num_host_blocks: int = 0, **keys) -> Scheduler:
    config = EngineConfig(model="none", block_size=4, max_model_len=64, **{"max_num_seqs": 8, **keys})
    return Scheduler(0, Role(role), config, num_blocks, 1 + num_host_blocks, MODEL)


def make_sequence(seq_id: int, num_prompt: int, max_tokens: int = 8, route: Route | None = None, **params) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, **params)
    prompt = list(range(10, 10 + num_prompt))
    seq = Sequence(seq_id, Request(str(seq_id), prompt, sampling), max_model_len=64, eos_token_ids=(EOS,), seed=seq_id)
    seq.route = route or Route(0, 0)
    return seq


def rows(batch: StepBatch) -> list[tuple[int, int, int, int]]:
    """(slot, start, length, flags) of each row."""
    columns = (batch.row_slots, batch.row_starts, batch.row_lens, batch.row_flags)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def answer(scheduler: Scheduler, batch: StepBatch, token: int = 5, now_s: float = 1.0) -> StepOutcome:
    tokens = np.full(np.count_nonzero(batch.row_flags & RowFlag.SAMPLE), token, np.int32)
    none = np.empty(0, np.int32)
    (outcome,) = scheduler.complete(StepResult(batch.step_id, 1, tokens, none, none, np.empty(0, np.float32)), now_s)
    return outcome


SAMPLE, DECODE = int(RowFlag.SAMPLE), int(RowFlag.SAMPLE | RowFlag.FROM_SLOT)


def test_a_prompt_is_computed_in_chunks_then_decodes_from_its_slot() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    seq = make_sequence(0, 14)
    scheduler.add(seq)
    batches = [scheduler.schedule().batch for _ in range(4)]  # all in flight at once: nothing waits for a result
    assert [rows(b) for b in batches] == [[(0, 0, 6, 0)], [(0, 6, 6, 0)], [(0, 12, 2, SAMPLE)], [(0, 14, 1, DECODE)]]
    assert np.concatenate([b.token_ids for b in batches]).tolist() == seq.token_ids[:14]
    assert batches[0].table_updates["block_id"].tolist() == seq.block_table  # the whole table, with room for one more
    assert len(seq.block_table) == 4
    for batch in batches:
        answer(scheduler, batch)
    assert seq.status is SequenceStatus.RUNNING


def test_decodes_go_first_and_chunks_take_what_is_left_of_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(0, 3))
    answer(scheduler, scheduler.schedule().batch)
    scheduler.add(make_sequence(1, 5))
    scheduler.add(make_sequence(2, 20))
    assert rows(scheduler.schedule().batch) == [(0, 3, 1, DECODE), (1, 0, 5, SAMPLE), (2, 0, 2, 0)]


def test_at_the_length_no_row_is_scheduled_although_the_last_token_is_not_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 3, max_tokens=2))
    first, second = scheduler.schedule().batch, scheduler.schedule().batch
    assert scheduler.schedule().batch is None
    assert not answer(scheduler, first).finished
    ((seq, status),) = answer(scheduler, second).finished
    assert status is SequenceStatus.FINISHED_LENGTH
    assert seq.output_token_ids == [5, 5]


def test_end_of_sequence_is_noticed_and_the_extra_row_dropped() -> None:
    scheduler = make_scheduler()
    seq = make_sequence(0, 3)
    scheduler.add(seq)
    first, extra = scheduler.schedule().batch, scheduler.schedule().batch
    ((finished, status),) = answer(scheduler, first, token=EOS).finished
    assert (finished, status) == (seq, SequenceStatus.FINISHED_STOPPED)
    scheduler.remove(seq)
    assert scheduler.residency.blocks.num_free == 98, "blocks that a step in flight writes to are parked"
    outcome = answer(scheduler, extra)
    assert outcome == StepOutcome()
    assert seq.output_token_ids == [EOS]
    assert scheduler.residency.blocks.num_free == scheduler.residency.blocks.num_usable


@pytest.mark.parametrize(
    ("params", "token", "reason"),
    [({"stop_token_ids": [9]}, 9, 9), ({"ignore_eos": True}, EOS, None), ({"stop_token_ids": [EOS]}, EOS, EOS)],
)
def test_the_first_token_is_checked_like_any_other(params: dict, token: int, reason: int | None) -> None:
    scheduler = make_scheduler()
    seq = make_sequence(0, 3, **params)
    scheduler.add(seq)
    outcome = answer(scheduler, scheduler.schedule().batch, token)
    assert bool(outcome.finished) == (reason is not None)
    assert seq.stop_reason == reason


def test_a_sequence_that_needs_feedback_waits_for_its_result() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, 3, stop=["x"]))
    batch = scheduler.schedule().batch
    assert scheduler.schedule().batch is None
    answer(scheduler, batch)
    batch = scheduler.schedule().batch
    assert rows(batch) == [(0, 3, 1, DECODE)]
    assert scheduler.schedule().batch is None


def test_the_youngest_is_preempted_and_starts_over_with_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=5)  # four to use
    old, young = make_sequence(0, 7), make_sequence(1, 3)
    for seq in (old, young):
        scheduler.add(seq)
    answer(scheduler, scheduler.schedule().batch)  # old: 2 blocks, young: 1
    assert young.status is SequenceStatus.RUNNING
    while not (scheduled := scheduler.schedule()).preempted:
        answer(scheduler, scheduled.batch, token=6)
    answer(scheduler, scheduled.batch, token=6)
    assert scheduled.preempted == [young]
    assert young.status is SequenceStatus.PREEMPTED
    assert young.token_ids == [10, 11, 12, 5, *[6] * (young.num_tokens - 4)]
    scheduler.add(young)
    while scheduler.queues.decodes.seqs:
        for seq, _ in answer(scheduler, scheduler.schedule().batch, token=6).finished:
            scheduler.remove(seq)
    batch = scheduler.schedule().batch
    assert batch.row_lens.tolist() == [young.num_tokens]
    assert batch.row_flags.tolist() == [SAMPLE]


def run_until_preempted(scheduler: Scheduler) -> tuple[list[Sequence], StepBatch]:
    """Three sequences, of which the last one has to leave, and the step that goes out then."""
    seqs = [make_sequence(i, num_prompt, max_tokens=20) for i, num_prompt in enumerate((5, 2, 6))]
    for i, seq in enumerate(seqs):
        seq.token_ids = [30 * i + token for token in seq.token_ids]
        scheduler.add(seq)
    preempted: list[Sequence] = []
    while not preempted:
        scheduled = scheduler.schedule()
        answer(scheduler, scheduled.batch)
        preempted = scheduled.preempted
    assert (preempted, seqs[2].num_tokens) == (seqs[2:], 10)
    scheduler.add(seqs[2])
    scheduler.check_integrity()
    return seqs, scheduled.batch


def test_a_preempted_sequence_is_swapped_out_and_comes_back_with_what_it_had() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5, enable_prefix_caching=False)
    (oldest, _, last), batch = run_until_preempted(scheduler)
    assert (last.num_swapped, last.host_table) == (9, [1, 2, 3])
    assert batch.copies["dst"].tolist() == [-1, -2, -3]
    assert scheduler.queues.reserve(1, []) is None, "room is kept for who had to leave"
    scheduler.remove(oldest)
    batch = scheduler.schedule().batch
    assert rows(batch)[-1] == (last.slot, 9, 1, SAMPLE)
    assert batch.copies.tolist() == [(-host, block) for host, block in zip([1, 2, 3], last.block_table)]
    answer(scheduler, batch)
    assert (last.status, last.host_table, scheduler.queues.num_waiting_tokens) == (SequenceStatus.RUNNING, [], 0)
    scheduler.check_integrity()


def test_blocks_that_are_still_there_are_not_swapped_in() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5)
    (oldest, _, last), _ = run_until_preempted(scheduler)
    scheduler.remove(oldest)
    assert scheduler.schedule().batch.copies.tolist() == [(-3, last.block_table[2])], "nobody has used the other two"


@pytest.mark.parametrize(("num_host_blocks", "pays"), [(2, True), (5, False)])
def test_without_room_in_host_memory_or_without_gain_all_is_computed_again(num_host_blocks: int, pays: bool) -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=num_host_blocks, enable_prefix_caching=False)
    scheduler.swap_where(lambda num_tokens: pays)
    (oldest, _, last), batch = run_until_preempted(scheduler)
    assert len(batch.copies) == 0
    scheduler.remove(oldest)
    assert rows(scheduler.schedule().batch)[-1] == (last.slot, 0, 10, SAMPLE)


def test_a_swapped_sequence_that_ends_leaves_nothing_in_host_memory() -> None:
    scheduler = make_scheduler(num_blocks=8, num_host_blocks=5)
    (*_, last), _ = run_until_preempted(scheduler)
    scheduler.remove(last)
    assert scheduler.residency.host_blocks.num_free == scheduler.residency.host_blocks.num_usable == 5


def test_no_sequence_is_admitted_that_would_push_a_running_one_out() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence(0, 5))
    answer(scheduler, scheduler.schedule().batch)
    scheduler.add(make_sequence(1, 3))  # one block is free, but the first sequence may want it next
    assert len(rows(scheduler.schedule().batch)) == 1


def test_forked_sequences_share_blocks_until_one_of_them_writes() -> None:
    scheduler = make_scheduler()
    parent = make_sequence(0, 6)
    scheduler.add(parent)
    answer(scheduler, scheduler.schedule().batch)
    scheduler.residency.slots.sync(parent)
    child = make_sequence(1, 6)
    child.token_ids = list(parent.token_ids)
    assert scheduler.queues.fork(parent, child)
    assert child.block_table == parent.block_table
    shared = parent.block_table[1]
    batch = scheduler.schedule().batch
    assert rows(batch) == [(0, 6, 1, DECODE), (1, 6, 1, SAMPLE)]
    assert batch.token_ids.tolist() == [5], "the child's slot does not have the last token yet"
    assert batch.copies.tolist() == [(shared, parent.block_table[1])]
    assert parent.block_table[0] == child.block_table[0]
    assert (parent.block_table[1], child.block_table[1]) != (shared, parent.block_table[1])
    scheduler.check_integrity()


def test_reservations_count_as_places_and_blocks() -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2)
    table, _ = scheduler.queues.reserve(15, [])
    assert len(table) == 4
    assert scheduler.queues.reserve(20, []) is None, "no blocks"
    other, _ = scheduler.queues.reserve(3, [])
    assert scheduler.queues.reserve(1, []) is None, "no place"
    scheduler.queues.cancel_reservation(other)
    seq = make_sequence(0, 15)
    scheduler.queues.take_over(seq, table)
    batch = scheduler.schedule().batch
    assert rows(batch) == [(0, 14, 1, SAMPLE)]
    assert batch.token_ids.tolist() == seq.token_ids[-1:]


def run_to_end(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler.add(seq)
    while (batch := scheduler.schedule().batch) is not None:
        for done, _ in answer(scheduler, batch).finished:
            scheduler.remove(done)
    scheduler.check_integrity()


@pytest.mark.parametrize(("num_prompt", "num_cached"), [(7, 4), (8, 4), (9, 8), (16, 12), (17, 16), (25, 16)])
def test_full_blocks_of_an_earlier_prompt_are_found_but_the_last_token_is_computed(
    num_prompt: int, num_cached: int
) -> None:
    scheduler = make_scheduler()
    run_to_end(scheduler, make_sequence(0, 18, max_tokens=1))
    seq = make_sequence(1, num_prompt)
    scheduler.add(seq)
    assert rows(scheduler.schedule().batch) == [(seq.slot, num_cached, num_prompt - num_cached, SAMPLE)]
    assert seq.log().num_cached_tokens == num_cached


def test_blocks_are_found_when_the_step_that_computes_them_is_done() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(0, 16))
    first, second = scheduler.schedule().batch, scheduler.schedule().batch
    answer(scheduler, first)
    scheduler.add(make_sequence(1, 20))
    assert rows(scheduler.schedule().batch) == [(0, 16, 1, DECODE), (1, 8, 7, 0)], "the second step is not done"
    answer(scheduler, second)
    scheduler.add(make_sequence(2, 20))
    assert rows(scheduler.schedule().batch)[2] == (2, 16, 2, 0)
    scheduler.check_integrity()


def test_cached_tokens_do_not_count_against_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    run_to_end(scheduler, make_sequence(0, 32, max_tokens=1))
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, 36))
    assert [row[1:3] for row in rows(scheduler.schedule().batch)] == [(32, 4)] * 3


def test_shared_blocks_take_no_room() -> None:
    scheduler = make_scheduler(num_blocks=9)
    scheduler.add(make_sequence(0, 20, max_tokens=4))
    answer(scheduler, scheduler.schedule().batch)  # has 6 of 8 blocks
    scheduler.add(make_sequence(1, 18, max_tokens=2))
    assert len(rows(scheduler.schedule().batch)) == 2
    assert scheduler.residency.blocks.num_free == 1


def test_the_answer_is_found_in_the_next_turn() -> None:
    scheduler = make_scheduler()
    first = make_sequence(0, 6, max_tokens=8)
    run_to_end(scheduler, first)
    second = make_sequence(1, 6)
    second.token_ids = [*first.token_ids, 1, 2, 3]  # 17; the last token of the answer was never computed
    scheduler.add(second)
    assert rows(scheduler.schedule().batch) == [(second.slot, 12, 5, SAMPLE)]


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = make_scheduler(num_blocks=8)
    old, young = make_sequence(0, 3, max_tokens=20), make_sequence(1, 13, max_tokens=20)
    for seq in (old, young):
        scheduler.add(seq)
    while not (scheduled := scheduler.schedule()).preempted:
        answer(scheduler, scheduled.batch, token=6)
    answer(scheduler, scheduled.batch, token=6)
    assert young.num_tokens > 17
    scheduler.remove(old)
    scheduler.add(young)
    (row,) = rows(scheduler.schedule().batch)
    assert row[1] == 16
    assert young.log().num_cached_tokens == 0, "its prompt was computed"


def test_an_aborted_prompt_leaves_what_was_computed_of_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=9)
    seq = make_sequence(0, 30)
    scheduler.add(seq)
    batches = [scheduler.schedule().batch, scheduler.schedule().batch]
    answer(scheduler, batches[0])
    scheduler.remove(seq)
    answer(scheduler, batches[1])
    scheduler.add(make_sequence(1, 30))
    assert rows(scheduler.schedule().batch)[0][1:3] == (8, 9)


def test_a_reservation_shares_blocks_that_need_not_move() -> None:
    scheduler = make_scheduler(role="decode")
    first, second = make_sequence(0, 18), make_sequence(1, 17)
    table, num_there = scheduler.queues.reserve(18, [])
    first.token_ids.append(5)
    scheduler.queues.take_over(first, table)
    scheduler.num_cached(second)
    assert scheduler.queues.reserve(17, second.block_keys)[1] == 3, "one block at least is left to move"
    again, num_there = scheduler.queues.reserve(18, second.block_keys)
    assert (again[:4], num_there, len(again)) == (table[:4], 4, 5)


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    run_to_end(scheduler, make_sequence(0, 18))
    scheduler.add(make_sequence(1, 18))
    assert rows(scheduler.schedule().batch)[0][1:3] == (0, 18)


def test_more_are_preempted_if_the_youngest_shares_all_its_blocks() -> None:
    """All need a block, none is free, and taking those of the youngest gives none back."""
    scheduler = make_scheduler(num_blocks=7)
    oldest, parent, child = make_sequence(0, 3), make_sequence(1, 7), make_sequence(2, 7)
    for seq in (oldest, parent):
        scheduler.add(seq)
    for _ in range(2):
        answer(scheduler, scheduler.schedule().batch)
    scheduler.residency.slots.sync(parent)
    child.token_ids = list(parent.token_ids)
    assert scheduler.queues.fork(parent, child)
    others = scheduler.residency.blocks.allocate(scheduler.residency.blocks.num_free)
    scheduled = scheduler.schedule()
    assert rows(scheduled.batch) == [(oldest.slot, 4, 1, DECODE)]
    assert scheduled.preempted == [child, parent]
    scheduler.check_integrity([others])


def test_steps_are_the_same_whatever_was_in_the_sets_and_dictionaries() -> None:
    def trace() -> list:
        scheduler = make_scheduler(num_blocks=20, max_num_batched_tokens=9)
        for i, length in enumerate((5, 9, 2, 13)):
            scheduler.add(make_sequence(i, length))
        out = []
        while (batch := scheduler.schedule().batch) is not None:
            out.append((rows(batch), batch.table_updates.tolist(), batch.token_ids.tolist()))
            for seq, _ in answer(scheduler, batch).finished:
                scheduler.remove(seq)
        return out

    assert trace() == trace()


# ------------------------------------------------------------------------------------------------------ preemption


def test_the_last_in_rank_is_preempted_whoever_came_first() -> None:
    scheduler = make_scheduler(num_blocks=5, enable_prefix_caching=False)
    first, urgent = make_sequence(0, 3, max_tokens=20), make_sequence(1, 3, max_tokens=20)
    urgent.rank = (-1, 1, 1)
    for seq in (first, urgent):
        scheduler.add(seq)
    while not (scheduled := scheduler.schedule()).preempted:
        answer(scheduler, scheduled.batch)
    assert scheduled.preempted == [first]
    assert rows(scheduled.batch) == [(urgent.slot, 8, 1, DECODE)]
    assert scheduler.num_preemptions == 1


def test_a_prompt_under_way_is_preempted_before_older_decodes() -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_batched_tokens=4, enable_prefix_caching=False)
    old, young = make_sequence(0, 3, max_tokens=20), make_sequence(1, 20)
    scheduler.add(old)
    answer(scheduler, scheduler.schedule().batch)
    scheduler.add(young)
    answer(scheduler, scheduler.schedule().batch)
    others = scheduler.residency.blocks.allocate(scheduler.residency.blocks.num_free)
    while not (scheduled := scheduler.schedule()).preempted:
        answer(scheduler, scheduled.batch)
    assert scheduled.preempted == [young]
    assert scheduler.queues.prefilling == []
    answer(scheduler, scheduled.batch)
    assert scheduler.queues.num_waiting_tokens == 0
    scheduler.check_integrity([others])


def test_budget_and_counts_outlive_the_worker_process() -> None:
    old, new = make_scheduler(), make_scheduler()
    old.num_preemptions = 7
    old.limit_chunks(5)
    new.succeed(old)
    assert (new.num_preemptions, new.max_num_batched_tokens) == (7, 5)


# ---------------------------------------------------------------------------------------------------------- drafts

DRAFTS = int(RowFlag.SAMPLE | RowFlag.DRAFTS)


class Guesses:
    """A drafter that always proposes the tokens 7, 7, 7, ..."""

    is_drafting = True
    num_drafts = num_accepted = 0

    def propose(self, max_drafts: int) -> list[int]:
        return [7] * max(0, max_drafts)

    def count_verified(self, num_drafts: int) -> None:
        self.num_drafts += num_drafts

    def count_accepted(self) -> None:
        self.num_accepted += 1

    def observe(self, token_id: int) -> None:
        pass


def start_drafting(scheduler: Scheduler, *seqs: Sequence) -> None:
    for seq in seqs:
        seq.drafter, seq.is_watched = Guesses(), True
        scheduler.add(seq)
    answer(scheduler, scheduler.schedule().batch)


def test_drafts_are_in_the_row_of_their_sequence_and_no_step_follows_before_the_result() -> None:
    scheduler = make_scheduler(num_speculative_tokens=3)
    seq, plain = make_sequence(0, 3), make_sequence(1, 3)
    scheduler.add(plain)
    start_drafting(scheduler, seq)
    batch = scheduler.schedule().batch
    assert set(rows(batch)) == {(plain.slot, 3, 1, DECODE), (seq.slot, 3, 4, DRAFTS)}
    assert batch.token_ids.tolist() == [5, 7, 7, 7]
    assert scheduler.schedule().batch is None


def test_drafts_that_were_right_are_outcomes_of_their_own() -> None:
    scheduler = make_scheduler(num_speculative_tokens=3)
    seq = make_sequence(0, 3)
    start_drafting(scheduler, seq)
    batch, none = scheduler.schedule().batch, np.empty(0, np.int32)
    tokens = np.array([7, 7, 9, 1], np.int32)  # behind 5, 7, 7 and 7: the third draft was wrong
    result = StepResult(batch.step_id, 1, tokens, none, none, np.empty(0, np.float32))
    assert [outcome.watched for outcome in scheduler.complete(result, 1.0)] == [[seq]] * 3
    assert seq.output_token_ids == [5, 7, 7, 9]
    assert rows(scheduler.schedule().batch)[0][1] == 6
    scheduler.check_integrity()


def test_drafts_end_where_the_answer_ends() -> None:
    scheduler = make_scheduler(num_speculative_tokens=7)
    seq = make_sequence(0, 3, max_tokens=4)
    start_drafting(scheduler, seq)
    assert rows(scheduler.schedule().batch) == [(0, 3, 3, DRAFTS)], "of four tokens, the last is not drafted"


def test_rows_of_a_step_are_shared_among_drafts_in_order_of_rank() -> None:
    scheduler = make_scheduler(num_speculative_tokens=3, max_num_batched_tokens=6)
    start_drafting(scheduler, make_sequence(0, 3), make_sequence(1, 3))
    assert [row[2] for row in rows(scheduler.schedule().batch)] == [4, 2]


def test_where_blocks_are_few_there_are_no_drafts() -> None:
    scheduler = make_scheduler(num_blocks=3, num_speculative_tokens=7, enable_prefix_caching=False)
    start_drafting(scheduler, make_sequence(0, 3, max_tokens=20))
    answer(scheduler, batch := scheduler.schedule().batch)
    assert rows(batch) == [(0, 3, 1, SAMPLE)], "the block of its token is full behind it, and one is free"
    assert not scheduler.residency.slots.num_drafts.any()
    scheduler.check_integrity()


# --------------------------------------------------------------------------------------------------------- repeats


def decode_at(scheduler: Scheduler, times_s: list[float]) -> None:
    for time_s in times_s:
        for step_result in [scheduler.in_flight[0]]:
            tokens, none = np.zeros(len(step_result.sampled_slots), np.int32), np.empty(0, np.int32)
            result = StepResult(step_result.step_id, 1, tokens, none, none, np.empty(0, np.float32))
            assert list(scheduler.complete(result, time_s)) == [StepOutcome()]
        scheduler.schedule()


def start_repeating(num_blocks: int = 100) -> tuple[Scheduler, list[Sequence]]:
    scheduler = make_scheduler(num_blocks)
    seqs = [make_sequence(i, 3 + i, max_tokens=30, ignore_eos=True) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.schedule()
    scheduler.schedule()
    decode_at(scheduler, [1.0, 2.0])
    return scheduler, seqs


def test_repeated_steps_leave_what_steps_one_by_one_leave() -> None:
    (jumping, jumped), (walking, walked) = start_repeating(), start_repeating()
    count = jumping.num_repeats()
    assert count > 10
    times_s = [3.0 + i for i in range(count)]
    jumping.repeat(np.array(times_s))
    decode_at(walking, times_s)
    for scheduler in (jumping, walking):
        scheduler.check_integrity()
        decode_at(scheduler, [100.0])
    t, other = jumping.residency.slots, walking.residency.slots
    for column in ("num_tokens", "num_computed", "writable_len", "end_len", "is_active", "has_last_token"):
        assert getattr(t, column).tolist() == getattr(other, column).tolist(), column
    assert [step.step_id for step in jumping.in_flight] == [step.step_id for step in walking.in_flight]
    assert jumping.snapshot() == walking.snapshot()
    for seq, same in zip(jumped, walked, strict=True):
        t.sync(seq)
        other.sync(same)
        assert (seq.token_ids, seq.token_times_s) == (same.token_ids, same.token_times_s)


def test_steps_repeat_only_as_far_as_nothing_changes() -> None:
    scheduler, seqs = start_repeating()
    t = scheduler.residency.slots
    assert scheduler.num_repeats() == int((t.last_start - t.num_computed)[[seq.slot for seq in seqs]].min())
    few, _ = start_repeating(num_blocks=10)
    assert 0 < few.num_repeats() < scheduler.num_repeats(), "blocks for fewer steps"
    scheduler.queues.expect(1)
    assert scheduler.num_repeats() == 0, "a sequence is on its way"
    scheduler.queues.expect(-1)
    scheduler.add(make_sequence(3, 3))
    assert scheduler.num_repeats() == 0, "a sequence waits"
