"""Saved programs: one file without pickle or code."""
