#!/bin/sh
# Serve a model with DeltaStore. Arguments are SGLang's and win over those below:
#   serve --kv-compress-tier k4v2
# MODEL is a folder or a Hugging Face name; without it, the small embedded model. DEVICE is cpu unless the image says cuda.
set -eu

# A line of its own: inside eval "$(...)" a failure would go unnoticed.
variables=$(deltastore env)
eval "$variables"
dtype=$(deltastore dtype)
if [ -z "${MODEL:-}" ]; then
    MODEL=$(deltastore model)
fi
exec python3 -m sglang.launch_server --model-path "$MODEL" --device "${DEVICE:-cpu}" --kv-compress deltastore \
    --dtype "$dtype" --host 0.0.0.0 --port 30000 --enable-cache-report --sleep-on-idle "$@"
