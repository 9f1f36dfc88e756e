"""Fused operations, each a plain-torch reference beside a Triton kernel: `fastsd_kernels.geglu.geglu`, and so on."""
