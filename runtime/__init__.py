"""The runtime: a Plan is pure data; executors run it. Knows a kernel only as an address with a
hash.
"""
