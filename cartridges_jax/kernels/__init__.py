"""Attention kernels, each with a reference beside it."""
