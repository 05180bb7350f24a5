"""The jobs of the command `nanopd`, a module each: run, chat, serve, profile, plan; report.py tells what was served.

A job is `run(args, config)`, which returns an exit status, beside `add_options` for the options that are its own.
The modules are imported by every command, so they load torch, the server and the laboratory only when a job runs.
They print, and use the public face of the library; they know nothing of workers and engines.
"""

FAILED = 1  # a row, a worker, the engine
BAD_USAGE = 2  # as argparse has it
