"""Vector quantization of weights."""
