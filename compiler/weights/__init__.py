"""Weights: named but not held, mapped from files, kept under a budget."""
