"""How Triton kernels of all methods are launched."""
