"""The only place that touches SGLang: flags, hooks, adapters, and the proof that they are in force.

Adapters translate, they never decide: what to do is decided in the modules above this folder.
`targets.py` lists every SGLang symbol that is hooked or subclassed, and for which version.
"""
