"""Passes: FX graph in, FX graph and remarks out; the function stays the same for every input."""
