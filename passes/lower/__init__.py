"""Lowerings of the canonical graph, one file a target."""
