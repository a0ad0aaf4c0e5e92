"""Write the tables between the marks of the documents anew, from the rows in benchmarks/results.

    python -m benchmarks.page

A table lies between <!-- table: NAME --> and <!-- end -->, where NAME is one of tables.TABLES. A test renders every
document again and compares, so that no figure differs from its rows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.tables import TABLES

DOCUMENTS = ("README.md", "benchmarks/results/README.md", "docs/deploy.md", "docs/gpu-kernels.md", "docs/models.md")
MARKED = re.compile(r"(?<=<!-- table: )(?P<name>[a-z0-9-]+)(?P<open> -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def rendered(text: str) -> str:
    """The document with every marked table as its rows say. Raises KeyError for a mark that names no table."""
    return MARKED.sub(lambda found: found["name"] + found["open"] + TABLES[found["name"]](), text)


def main() -> int:
    for path in (ROOT / Path(name) for name in DOCUMENTS):
        text = path.read_text()
        if (made := rendered(text)) != text:
            path.write_text(made)
            print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
