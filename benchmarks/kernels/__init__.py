"""How fast the CPU kernels are, beside the memory they must read and beside torch: `python -m benchmarks.kernels`."""
