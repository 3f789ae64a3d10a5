"""Devices and processes: the mesh, the collectives written by hand, jobs of several processes."""
