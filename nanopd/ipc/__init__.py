"""How processes of one machine exchange bytes: shared memory, a ring in it, a doorbell to wake the other side.

Knows bytes and file descriptors, not what they mean. Everything here lives in descriptors that are handed over
while a process is spawned; nothing has a name in a file system, so nothing is left behind after a kill -9.

Why a ring and no pipe: with eight workers, steps of 256 rows (4,184 bytes there, 1,088 back) cost the parent 9 us of
its core each, through multiprocessing.Pipe 14; with two steps in flight 6 and 12 us, and 141 and 313 us until the
answer is there (medians of 15 paired rounds on two cores that all processes shared). With one worker either was ahead,
by where the processes were placed.
"""
