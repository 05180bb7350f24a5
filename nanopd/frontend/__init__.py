"""What users hold: `LLM`, `AsyncLLM`, rows of JSON, and the thread that runs the engine for them."""
