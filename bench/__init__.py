"""Benchmarks: workloads written from the papers, the engines to compare with, and the harness."""
