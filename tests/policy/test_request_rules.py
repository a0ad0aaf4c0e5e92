"""Requests that would end SGLang's scheduler are known for what they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deltastore.policy import request_rules
from sglang_deltastore.policy.request_rules import BadRequest

VOCABULARY, CONTEXT = 1000, 128


def sampling(**given: Any) -> SimpleNamespace:
    plain = {
        "stop_token_ids": None, "min_new_tokens": 0, "top_k": 1, "repetition_penalty": 1.0, "stream_interval": None,
        "logit_bias": None, "stop_regex_strs": [],
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **given})


def asked(**given: Any) -> SimpleNamespace:
    plain = {
        "logprob_start_len": -1, "top_logprobs_num": 0, "token_indices_to_pool": None,
        "multi_item_delimiter_indices": None,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **given})


@pytest.mark.parametrize(
    "given",
    [
        {}, {"stop_token_ids": {0, 999}}, {"min_new_tokens": 128}, {"top_k": 1 << 30}, {"repetition_penalty": 1e-6},
        {"stream_interval": 1}, {"logit_bias": {"5": -1e30, "6": 1e30}}, {"stop_regex_strs": ["a+", "(?<=a)b"]},
    ],
)  # fmt: skip
def test_what_the_scheduler_can_take(given: dict[str, Any]) -> None:
    request_rules.check_sampling(sampling(**given), VOCABULARY, CONTEXT)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"stop_token_ids": {1000}}, "stop_token_ids contains 1000; allowed is 0 to 999"),
        ({"stop_token_ids": {-5, 3}}, "stop_token_ids contains -5"),
        ({"min_new_tokens": 129}, "min_new_tokens is 129; allowed is 0 to 128"),
        ({"top_k": 1 << 31}, "top_k is 2147483648; allowed is 1 to 1073741824"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty is 1e-07; allowed is 1e-06 to 2"),
        ({"stream_interval": 0}, "stream_interval is 0; allowed is 1 to 128"),
        ({"logit_bias": {"5": float("inf")}}, "logit_bias[5] is inf; allowed is -1e+30 to 1e+30"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias[5] is nan"),
        ({"stop_regex_strs": ["(?<=a+)b"]}, "stop_regex is '(?<=a+)b', which does not compile"),
    ],
)
def test_what_it_cannot(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        request_rules.check_sampling(sampling(**given), VOCABULARY, CONTEXT)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"logprob_start_len": -2}, "logprob_start_len is -2; allowed is -1 to 20"),
        ({"logprob_start_len": 21}, "logprob_start_len is 21"),
        ({"top_logprobs_num": 1001}, "top_logprobs_num is 1001; allowed is 0 to 1000"),
        ({"top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"token_indices_to_pool": [19, 20]}, "token_indices_to_pool is 20; allowed is 0 to 19"),
        ({"multi_item_delimiter_indices": [-1]}, "multi_item_delimiter_indices is -1"),
    ],
)
def test_positions_that_a_prompt_does_not_have(given: dict[str, Any], complaint: str) -> None:
    request_rules.check_positions(asked(logprob_start_len=20, top_logprobs_num=1000), 20, VOCABULARY)
    with pytest.raises(BadRequest) as refusal:
        request_rules.check_positions(asked(**given), 20, VOCABULARY)
    assert complaint in str(refusal.value)


def test_a_session_knows_the_rest_of_its_prompt() -> None:
    request_rules.check_positions(asked(logprob_start_len=500), None, VOCABULARY)


@pytest.mark.parametrize(
    ("input_ids", "complaint"),
    [([], "0 tokens"), ([5, 1000], "contains 1000"), ([-1], "contains -1"), ([True], "contains True")],
)
def test_prompts_without_tokens_or_with_others(input_ids: list[Any], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        request_rules.check_prompt(input_ids, VOCABULARY)
    request_rules.check_prompt([0, 999], VOCABULARY)


@pytest.mark.parametrize("params", [{"n": 10**9}, {"n": 0}, {"n": "two"}, {"n": True}, [{"n": 1}, {"n": -1}], "x", [3]])
def test_counts_of_answers(params: Any) -> None:
    with pytest.raises(BadRequest):
        request_rules.check_answers(params)
    request_rules.check_answers([{"n": 4096}, {"n": None}, {}])


@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "Qwen2AudioForConditionalGeneration"])
@pytest.mark.parametrize("name", request_rules.MEDIA)
def test_media_are_refused_where_nothing_proves_them(architecture: str, name: str) -> None:
    with pytest.raises(BadRequest, match=f"{name} is given to {architecture}; allowed is text alone"):
        request_rules.check_media(SimpleNamespace(**{name: [["a.png"]]}), [architecture])


@pytest.mark.parametrize("architecture", request_rules.WITH_IMAGES)
def test_images_alone_are_taken_where_they_were_compared(architecture: str) -> None:
    request_rules.check_media(SimpleNamespace(image_data=["a.png"], video_data=None), [architecture])
    with pytest.raises(BadRequest, match=r"video_data is given .* allowed is text and image_data"):
        request_rules.check_media(SimpleNamespace(image_data=None, video_data="a.mp4"), [architecture])


@pytest.mark.parametrize("nothing", [None, [], [None, None], [[], [None]]])
def test_no_media_are_text(nothing: Any) -> None:
    request = SimpleNamespace(image_data=nothing, video_data=nothing, audio_data=nothing)
    request_rules.check_media(request, ["Gemma3ForConditionalGeneration"])
