"""What the benchmarks of training have in common."""
