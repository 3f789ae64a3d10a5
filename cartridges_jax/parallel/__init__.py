"""Several devices and processes: the mesh, the communication on it, and jobs of several processes."""
