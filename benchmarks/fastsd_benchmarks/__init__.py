"""The benchmark harness and the step-count profiler (they arrive with the benchmark matrix)."""
