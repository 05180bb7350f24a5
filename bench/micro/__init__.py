"""Measurements of parts: kernels, rings, transfers, the parent, the router, and one engine alone."""
