"""Sequences that wait for another one with the same prompt, in order to share its blocks.

They are on no worker. When their parent decodes, they are forked from it one after the other, as there is room; if it
ends before, the first of them is computed from the beginning in its place, and the others follow that one.
Parent process, one thread. Knows schedulers; routes are the engine's.
"""

from __future__ import annotations

from collections import deque

from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import EventKind


class Followers:
    """All that wait, by their parents."""

    def __init__(self, schedulers: list[Scheduler]) -> None:
        """`schedulers` by worker: the engine's own list."""
        self._schedulers = schedulers
        self._of: dict[Sequence, deque[Sequence]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, seq: Sequence, parent: Sequence) -> None:
        self._of.setdefault(parent, deque()).append(seq)

    def join(self, now_s: float) -> list[Sequence]:
        """Let those join whose parents decode; returns who is to be computed from the beginning instead."""
        left = []
        for parent, followers in list(self._of.items()):
            if parent.status is SequenceStatus.RUNNING and parent.worker is not None:
                scheduler = self._schedulers[parent.worker]
                if not scheduler.role.may_decode:  # its role has changed
                    left += self.release(parent)
                    continue
                while followers and _has_joined(followers[0], parent, scheduler, now_s):
                    followers.popleft()
                if not followers:
                    del self._of[parent]
        return left

    def release(self, parent: Sequence) -> list[Sequence]:
        """Nobody follows it any more; returns who is to be computed from the beginning in its place: one, or none."""
        followers = self._of.pop(parent, deque())
        while followers and followers[0].status.is_finished:
            followers.popleft()
        if not followers:
            return []
        first = followers.popleft()
        if followers:
            self._of[first] = followers
        return [first]

    def leader_of(self, seq: Sequence) -> Sequence:
        """Whose prompt is computed for it: its parent's, or its own."""
        return next((parent for parent, followers in self._of.items() if seq in followers), seq)


def _has_joined(child: Sequence, parent: Sequence, scheduler: Scheduler, now_s: float) -> bool:
    """Whether there was room for it, or it has ended."""
    if not child.status.is_finished:
        if not scheduler.queues.fork(parent, child):
            return False
        child.route = parent.route
        child.log_event(now_s, EventKind.SCHEDULED, scheduler.worker)
    return True
