"""Fused operations, each a plain-torch reference beside a Triton kernel (they arrive with the kernels)."""
