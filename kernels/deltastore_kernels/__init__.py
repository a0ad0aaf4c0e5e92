"""Packed KV pages: their byte layout, their codec, and the operations that attention runs on them.

Needs torch alone. Knows nothing of SGLang, of tiers, or of who asks.
"""
