"""Compressed models that run: loading, the modules, the adapter for transformers."""
