"""Placement: which device runs each operator, and in which order, when no single device suffices.

Problems and placements are plain data (``placement-problem v1``, ``placement v1``; see
docs/placement.md), so the planner works without a model and never imports torch.
"""

from __future__ import annotations
