"""Prompts with an image: the same as stock, also from the cache, which knows one image from another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.families.measure import RAW_NATS
from tests.e2e.image_prompts import WORDS_BEFORE, WORDS_BEHIND

pytestmark = pytest.mark.slow

WITH_IMAGES = ("qwen2.5-vl", "qwen3-vl")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.e2e.image_prompts", *WITH_IMAGES],
        capture_output=True, text=True, timeout=900, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    return mean(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_an_image_s_tokens_are_attended_to_as_in_stock(found: dict[str, Any], name: str) -> None:
    stock, raw = found[name]["stock"], found[name]["raw"]
    assert raw["cold"]["tokens"] > WORDS_BEFORE + WORDS_BEHIND + 10, "the image is many tokens"
    for what in ("cold", "hit", "other"):
        assert apart(raw[what], stock[what]) < RAW_NATS
    assert apart(raw["hit"], raw["other"]) > 10 * RAW_NATS, "the image matters"


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_another_image_is_not_found_in_the_cache(found: dict[str, Any], name: str) -> None:
    raw = found[name]["raw"]
    assert raw["hit"]["cached"] > WORDS_BEFORE + 10, "the image's own tokens were found"
    assert raw["other"]["cached"] <= WORDS_BEFORE + 1
