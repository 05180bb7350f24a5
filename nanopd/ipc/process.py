"""What a spawned process does to itself: it must not outlive its parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends. The child's first call.

    Linux sends the signal when the *thread* that spawned this process ends, so that thread has to live as long as
    the child may. For a child of start method spawn or fork; raises OSError if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    assert parent is not None, "die_with_parent() is for a process started by multiprocessing"
    if os.getppid() != parent.pid:  # it ended before prctl took effect, and no signal will come
        os.kill(os.getpid(), signal.SIGKILL)
