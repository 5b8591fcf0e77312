"""Measurement of one model: floating-point operations, memory and latency."""
