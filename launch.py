"""The command `nanopd` from a checkout: `python launch.py --config cpu-demo`."""

import sys

from nanopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
