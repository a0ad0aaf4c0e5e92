"""`deltastore downstream`: what a compressed context costs a task, beside the plain cache in the same run.

Every example is a context that is cached first and a question read behind it, so that each answer
depends on what the cache kept. Tasks, at each context length:

    passkey    five digits hidden in filler text (arXiv:2305.16300); the first number of the answer
    kv         a value by its key in a JSON object of UUIDs (arXiv:2307.03172); the first UUID
    last_word  a passage's last word, which the passage named before (LAMBADA, arXiv:1606.06031)
    piqa       the likelier of two solutions (arXiv:1911.11641), behind solved questions of the same file
    agreement  tokens until greedy decoding leaves the plain cache's, on recorded transcripts
"""
