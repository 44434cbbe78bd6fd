"""Placement: models divided over devices, and running them there."""
