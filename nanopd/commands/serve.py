"""The job `serve`: an OpenAI-compatible server over one engine, until a signal comes."""

from __future__ import annotations

import argparse
import os
import sys

import nanopd
from nanopd.config import EngineConfig
from nanopd.errors import NanopdError

API_KEY_HELP = "what clients must send; by default the environment's NANOPD_API_KEY, and nothing without it"


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1, this machine only)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one")
    group.add_argument("--api-key", metavar="KEY", default=os.environ.get("NANOPD_API_KEY"), help=API_KEY_HELP)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    try:
        from nanopd.serve import app
    except ImportError as error:
        raise NanopdError(f"--serve needs more packages: pip install nanopd[serve] ({error})") from error
    with app.bind(args.host, args.port) as listener:  # a port that is taken is told before the model is loaded
        llm = nanopd.AsyncLLM(config=config, show_progress=sys.stderr.isatty())
        with llm.llm:
            host, port, *_ = listener.getsockname()
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"nanopd: serving {config.model} at http://{address}/v1", file=sys.stderr, flush=True)
            app.run(llm, listener, args.api_key)
    return 0
