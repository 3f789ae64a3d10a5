"""Inference servers, seen as one coroutine: messages in, a completion out."""
