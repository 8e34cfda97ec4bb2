"""Measures models and artifacts, checks them, and describes them to people."""
