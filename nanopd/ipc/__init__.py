"""How processes of one machine exchange bytes: shared memory, a ring in it, a doorbell to wake the other side.

Knows bytes and file descriptors, not what they mean. Everything here lives in descriptors that are handed over
while a process is spawned; nothing has a name in a file system, so nothing is left behind after a kill -9.
"""
