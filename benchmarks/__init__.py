"""Measurements, apart from tests: they check their answers first, then print rows with provenance."""
