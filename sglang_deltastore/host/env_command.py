"""`deltastore env`: print the shell commands after which SGLang starts on this machine."""

import argparse
import json
import shlex

from .environment import variables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shell", choices=("sh", "fish"), default="sh", help="whose syntax to print (default: sh)")
    parser.add_argument("--json", action="store_true", help="print one JSON object of names and values instead")


def run(args: argparse.Namespace) -> int:
    wanted = variables()
    if args.json:
        print(json.dumps(wanted))
    elif not wanted:
        print("# deltastore: a GPU is usable here; SGLang needs no variables set")
    else:
        line = _fish_line if args.shell == "fish" else _sh_line
        print("\n".join(line(name, value) for name, value in wanted.items()))
    return 0


def _sh_line(name: str, value: str) -> str:
    return f"export {name}={shlex.quote(value)}"


def _fish_line(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"set -gx {name} '{escaped}'"
