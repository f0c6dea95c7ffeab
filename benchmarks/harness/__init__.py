"""What the benchmarks share: contestants that take turns, and ours among them."""
