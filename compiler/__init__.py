"""The compiler: capture, the pass pipeline, lowering to a Plan, and the public API."""
