"""The OpenAI-compatible server, an extra: `pip install nanopd[serve]`.

protocol.py says what requests and answers look like, app.py answers, metrics.py counts. Sees the engine through
`AsyncLLM` alone, and runs in one event loop.
"""
