"""`deltastore model`: print the folder of an embedded model, making it first when needed."""

import argparse
import sys

from .embedded import MODELS, ModelError
from .models import cached_folder, model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="smollm2", metavar="NAME", help="default: smollm2; see --list")
    parser.add_argument("--list", action="store_true", help="list the models and whether they are made already")


def run(args: argparse.Namespace) -> int:
    if args.list:
        for model in MODELS.values():
            state = "ready" if cached_folder(model).exists() else "not made yet"
            print(
                f"{model.name:12} {state:13} {model.folder_bytes / 1e6:4.0f} MB  {model.description} ({model.license})"
            )
        return 0
    try:
        print(model_path(args.name))
    except ModelError as error:
        print(f"deltastore model: {error}", file=sys.stderr)
        return 1
    return 0
