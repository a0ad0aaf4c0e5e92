"""DeltaStore: SGLang's KV cache, rotated and quantized, behind `--kv-compress deltastore`.

Importing this package changes nothing: SGLang loads the plugin itself, through the entry-point
group `sglang.srt.plugins`, and acts on it only when the flag asks for it.
"""

__version__ = "0.1.0"
