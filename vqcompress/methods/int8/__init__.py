"""INT8 weights per channel, activations per token (W8A8)."""
