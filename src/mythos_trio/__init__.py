"""mythos-trio: see README.rst."""
