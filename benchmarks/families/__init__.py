"""Every family of models, tiny and of random weights in the family's own shape, against stock SGLang on a CPU."""
