"""Kernels: groups of FX nodes become compiled functions with one C ABI (see `kernels.abi`)."""
