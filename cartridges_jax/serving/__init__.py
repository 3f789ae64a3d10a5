"""Serving: an engine (the only JAX), a scheduler that shares it between requests, and an OpenAI-compatible server."""
