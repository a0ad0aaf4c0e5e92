"""How many GPUs, what cost, and what a larger resident cache is worth on real traces.

`planner` computes a fleet from a model, a GPU, a workload and a tier; `claims` derives published scenarios with it.
`replay` runs a trace of requests through `tree`, a radix tree that evicts as SGLang's does; `traces` reads the traces.
Every number that is not derived lies in `data/*.toml` with its source, or is an option of the command.
"""
