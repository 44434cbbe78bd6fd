"""Capture: from a Python call to a flat graph of ATen operators."""
