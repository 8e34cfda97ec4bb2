"""One run of `quantize`, from a checkpoint to an artifact."""
