"""What the GPU kernels cost: from their machine code without a GPU, and in time on one."""
