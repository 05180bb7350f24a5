"""One device process: holds weights and KV cache, executes steps and transfer plans. Never imports `core`."""
