"""What `benchmarks.gpu_check` runs on a GPU: its parts, each a process of its own, and their lines."""
