"""The documents make a site, and no link in it leads nowhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def made(root: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` there, in the environment that runs this test."""
    environment = Path(sys.prefix)
    command = ["make", "-o", str(environment / ".ready"), f"VENV={environment}", "docs"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What git knows here, with its changes."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path


def test_it_is_made_without_a_warning(checkout: Path) -> None:
    done = made(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Serving" in (checkout / ".site/html/docs/serving/index.html").read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "serving.md#nowhere"])
def test_a_link_that_leads_nowhere_ends_it(checkout: Path, link: str) -> None:
    with (checkout / "docs/models.md").open("a") as page:
        page.write(f"\n[elsewhere]({link})\n")
    assert made(checkout).returncode != 0
