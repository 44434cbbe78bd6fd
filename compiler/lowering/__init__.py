"""Lowering: a graph cut into groups becomes a Plan with its constants and kernels."""
