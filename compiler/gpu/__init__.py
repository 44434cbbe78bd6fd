"""Compilation for a GPU."""
