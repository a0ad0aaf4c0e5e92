"""The laboratory: our packed pages as a transformers cache, and what compression costs any Hugging Face model."""
