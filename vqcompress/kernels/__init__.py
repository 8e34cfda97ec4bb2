"""Triton kernels for what the floors above compute; each module names the function whose contract it keeps."""
