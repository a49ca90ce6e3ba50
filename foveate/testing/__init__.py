"""How kernels are proven: tolerances, inputs, poisoned memory, compilers, sanitizers. The package never imports it."""
