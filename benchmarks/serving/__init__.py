"""Benchmarks that start real servers."""
