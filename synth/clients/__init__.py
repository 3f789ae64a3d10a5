"""Clients of inference servers: each is seen as one coroutine, messages in, a completion out."""
