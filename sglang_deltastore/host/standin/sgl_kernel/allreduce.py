"""Stand-in for `sgl_kernel.allreduce`: imported by SGLang everywhere, used on GPUs only."""
