"""Kernel families; import them as `foveate.kernels.<family>`."""
