"""The stored dims of a head, of all that layout.py has, that the kernels for a CPU are tested with."""

HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256, 512)
"""Powers of two, what models have in between, and the widest."""
