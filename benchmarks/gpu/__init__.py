"""What `benchmarks.gpu_check` runs: parts, each a process of its own, and their lines."""
