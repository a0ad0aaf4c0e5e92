"""`deltastore dtype`: print what `--dtype` should be on this machine."""

import argparse

from .dtype import serving_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    print(serving_dtype())
    return 0
