"""Measurements, always beside a baseline; the only room that may import programs."""
