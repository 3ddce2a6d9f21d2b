"""One small script per library, run inside that library's own environment by `benchmarks.training`."""
