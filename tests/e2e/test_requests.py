"""No request ends the server: what SGLang would die of is answered with 400, everything else as always."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from sglang_deltastore.host.server_process import Server
from tests.e2e.client import generate, post, prompt
from tests.e2e.conftest import StartServer
from tests.e2e.fuzz import ARGUMENTS, fuzz

pytestmark = pytest.mark.slow

FUZZ_BODIES, FUZZ_SEED = 500, 20
FEW = {"max_new_tokens": 3, "temperature": 0}
VOCABULARY = 49152


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(*ARGUMENTS)


def assert_lives(server: Server) -> None:
    assert len(generate(server, prompt(20, seed=1), tokens=2)["output_ids"]) == 2
    assert server.store_stats().accounting_errors == ()


def test_the_log_says_once_what_started(server: Server) -> None:
    (line,) = [line for line in server.log_path.read_text().splitlines() if "DeltaStore: tier" in line]
    for part in ("tier k4v2 (K4V2); kernels ", "calibration: none, as --kv-compress-calibration says; capacity 1,024"):
        assert part in line


EMPTY = "the prompt has 0 tokens; allowed is 1 or more"


@pytest.mark.parametrize(
    "body",
    [{"text": ["hello there", ""]}, {"text": ["", "hello there"]}, {"input_ids": [[5, 6, 7], []]}, {"text": ""}],
)
def test_an_empty_prompt_is_answered_with_400(server: Server, body: dict[str, Any]) -> None:
    response = post(server, **body, sampling_params=FEW)
    assert response.status_code == 400, response.text
    assert EMPTY in response.text
    assert_lives(server)


@pytest.mark.parametrize("lengths", [(1,), (15,), (16,), (17,), (1, 16), (16, 16), (16, 1, 17), (32, 31)])
def test_prompts_about_a_page_are_answered(server: Server, lengths: tuple[int, ...]) -> None:
    for _ in range(2):  # and again from the tree
        ids = [prompt(length, seed=length) for length in lengths]
        response = post(server, input_ids=ids, sampling_params={**FEW, "ignore_eos": True})
        assert response.status_code == 200, response.text
        assert [len(answer["output_ids"]) for answer in response.json()] == [3] * len(lengths)
    assert_lives(server)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_answers_of_no_token_and_of_one(server: Server, new_tokens: int) -> None:
    response = post(server, input_ids=prompt(16, seed=3), sampling_params={"max_new_tokens": new_tokens})
    assert response.status_code == 200
    assert len(response.json()["output_ids"]) == new_tokens


RANGE = f"allowed is 0 to {VOCABULARY - 1}"


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        ({"stop_token_ids": [999999, -5], "min_new_tokens": 2}, f"stop_token_ids contains -5; {RANGE}"),
        ({"stop_token_ids": [60000], "min_new_tokens": 2}, f"stop_token_ids contains 60000; {RANGE}"),
        ({"logit_bias": {"60000": 1.0}}, "logit_bias must has keys in [0, 49151]"),
        ({"logit_bias": {"5": 1e39}}, "logit_bias[5] is 1e+39; allowed is -1e+30 to 1e+30"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300; allowed is 1e-06 to 2"),
        ({"top_k": 1 << 40, "temperature": 1.0}, "top_k is 1099511627776; allowed is 1 to 1073741824"),
        ({"min_new_tokens": -1}, "min_new_tokens must be in"),
        ({"max_new_tokens": None, "min_new_tokens": 1 << 40}, "min_new_tokens is 1099511627776; allowed is 0 to 128"),
        ({"max_new_tokens": 10**12}, "exceeds the model's maximum context length"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"stream_interval": 0}, "stream_interval is 0; allowed is 1 to 128"),
        ({"stop_regex": "(?<=a+)b"}, "stop_regex is '(?<=a+)b', which does not compile (look-behind requires"),
        ({"custom_params": {"a": {"b": {"c": 1}}}}, "has a wrong type or size"),
        ({"n": 10**9}, "n is 1000000000; allowed is 1 to 4096"),
        ({"n": 0}, "n is 0; allowed is 1 to 4096"),
    ],
)
def test_sampling_that_would_end_the_scheduler(server: Server, sampling: dict[str, Any], complaint: str) -> None:
    response = post(server, text="hello there", sampling_params={**FEW, **sampling})
    assert response.status_code == 400, response.text
    assert complaint in response.json()["error"]["message"]
    assert_lives(server)


def test_a_value_of_another_type(server: Server) -> None:
    response = post(server, text="hello there", sampling_params={**FEW, "temperature": "hot"})
    assert response.status_code == 400, response.text
    assert_lives(server)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"input_ids": [5, VOCABULARY]}, f"input_ids contains {VOCABULARY}; {RANGE}"),
        ({"input_ids": [5, -1]}, f"input_ids contains -1; {RANGE}"),
        ({"top_logprobs_num": 60000, "return_logprob": True}, "top_logprobs_num is 60000; allowed is 0 to 49152"),
        ({"top_logprobs_num": -1, "return_logprob": True}, "top_logprobs_num is -1; allowed is 0 to 49152"),
        ({"token_ids_logprob": [60000], "return_logprob": True}, "token_ids_logprob contains out-of-vocabulary"),
        ({"token_ids_logprob": [-1], "return_logprob": True}, "token_ids_logprob contains out-of-vocabulary"),
        ({"logprob_start_len": -7, "return_logprob": True}, "logprob_start_len is -7; allowed is -1 to 2"),
        ({"logprob_start_len": 50, "return_logprob": True}, "logprob_start_len is 50; allowed is -1 to 2"),
        ({"token_indices_to_pool": [99]}, "token_indices_to_pool is 99; allowed is 0 to 1"),
    ],
)
def test_positions_and_ids_out_of_range(server: Server, body: dict[str, Any], complaint: str) -> None:
    asked = {"text": "hello there", **body}
    if "input_ids" in body:
        del asked["text"]
    response = post(server, **asked, sampling_params=FEW)
    assert response.status_code == 400, response.text
    assert complaint in response.json()["error"]["message"]
    assert_lives(server)


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ("release_memory_occupation", "DeltaStore's pages are not in SGLang's memory saver"),
        ("resume_memory_occupation", "DeltaStore's pages are not in SGLang's memory saver"),
        ("start_expert_distribution_record", "SGLang records experts only with --expert-distribution-recorder-mode"),
    ],
)
def test_commands_that_would_end_the_scheduler(server: Server, route: str, reason: str) -> None:
    response = requests.post(f"{server.url}/{route}", json={}, timeout=60)
    assert response.status_code == 400, response.text
    assert f"{route} is refused: {reason}" in response.text
    assert_lives(server)


def test_the_extremes_that_are_allowed(server: Server) -> None:
    body = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3, "token_ids_logprob": [0, 49151]}
    sampling = {
        **FEW, "stop_token_ids": [0, VOCABULARY - 1], "min_new_tokens": 2, "logit_bias": {"49151": -1e30}, "n": 2,
        "repetition_penalty": 1e-6, "temperature": 1e-6,
    }  # fmt: skip
    response = post(server, text="hello there", sampling_params=sampling, **body)
    assert response.status_code == 200, response.text
    assert len(response.json()) == 2
    assert_lives(server)


def test_no_odd_body_harms_the_server(server: Server) -> None:
    statuses = fuzz(server, FUZZ_BODIES, FUZZ_SEED)
    assert sum(statuses.values()) == FUZZ_BODIES
    assert statuses[200] > FUZZ_BODIES / 20, "nearly nothing reached the model"
