"""A transformers model: run block by block, its folds, experts and compressed layers."""
