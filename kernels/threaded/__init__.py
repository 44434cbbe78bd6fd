"""Kernels for GPUs that are written thread by thread.

DLight's rules schedule loops whose extents are known. Where only the run knows how many rows a
branch gets, or where elements are put in order, the functions here say themselves what every
thread does. Their launches are the same for all data, so that they fit in a CUDA graph, and all
have blocks of `definition.THREADS`, so that they can share a launch with plain schedules.
"""
