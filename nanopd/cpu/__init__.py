"""The operations of a decoder on the CPU: `ops`."""

from nanopd.cpu.ops import prepare_thread

__all__ = ["prepare_thread"]
