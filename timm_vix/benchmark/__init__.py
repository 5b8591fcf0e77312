"""Comparison of several models: what they cost, and what they score."""
