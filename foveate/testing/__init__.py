"""How kernels and engine are proven: tolerances, inputs, poisoned memory, compilers, sanitizers, real weights.

The package never imports it.
"""
