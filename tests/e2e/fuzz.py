"""Odd bodies for every HTTP route of a server: whatever comes back, the server lives and its books balance.

    python -m tests.e2e.fuzz --bodies 10000 --seed 1      (make fuzz)

Routes, fields and their types come from the server's own /openapi.json. A body is one that works, with some fields
replaced by values of their type, odd or huge, or of another type.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sglang_deltastore.host.server_process import Server, log_tail, serve

ARGUMENTS = (
    *("--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--random-seed", "1"),
    *("--kv-compress", "deltastore", "--kv-compress-tier", "k4v2", "--kv-compress-calibration", "none"),
    *("--context-length", "128", "--max-total-tokens", "1024", "--max-running-requests", "4"),
)
"""A context of 128 tokens keeps a huge answer cheap."""

ANSWER_S = 60
CHECK_EVERY = 20

STOPS_BY_DESIGN = {
    "/pause_generation": "stops answering until it is told to go on",
    "/slow_down": "makes every step as slow as it is told",
    "/start_profile": "writes traces to a folder of the sender's choice, and slows the server down",
    "/stop_profile": "its other half",
    "/configure_logging": "writes files to a folder of the sender's choice",
    "/weights_checker": "can replace the weights",
    "/update_weights_from_disk": "replaces the weights",
    "/update_weights_from_tensor": "replaces the weights",
    "/update_weights_from_distributed": "waits for another machine",
    "/update_weights_from_ipc": "waits for another process",
    "/init_weights_update_group": "waits for another machine",
    "/destroy_weights_update_group": "its other half",
    "/init_weights_send_group_for_remote_instance": "waits for another machine",
    "/send_weights_to_remote_instance": "waits for another machine",
    "/begin_weight_update": "opens the weights for replacement",
    "/end_weight_update": "its other half",
    "/scale_elastic_ep": "waits for other machines",
}
"""Routes of an administrator's that may keep a server from answering, or reach outside of it."""

SAMPLING = (
    *("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k"),
    *("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n", "beam_width", "json_schema"),
    *("regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
    *("no_stop_trim", "stream_interval", "logit_bias", "sampling_seed", "custom_params", "watermark", "stop_strs"),
)
"""Fields of sampling_params, which the OpenAPI leaves open."""

CHEAP = {"max_new_tokens": 2, "temperature": 0}
MESSAGES = [{"role": "user", "content": "hello"}]
WORKING: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello there", "sampling_params": CHEAP},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "m", "messages": MESSAGES, "max_tokens": 2},
    "/invocations": {"model": "m", "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "m", "input": "hello", "max_output_tokens": 2},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "m", "messages": MESSAGES},
    "/v1/embeddings": {"model": "m", "input": "hello"},
    "/v1/tokenize": {"model": "m", "prompt": "hello"},
    "/v1/detokenize": {"model": "m", "tokens": [5, 6, 7]},
    "/v1/score": {"model": "m", "query": "hello", "items": ["a"], "label_token_ids": [5, 6]},
    "/v1/rerank": {"query": "hello", "documents": ["a", "b"]},
    "/api/chat": {"model": "m", "messages": MESSAGES, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"model": "m", "prompt": "hello", "stream": False, "options": {"num_predict": 2}},
    "/vertex_generate": {"instances": [{"text": "hello"}], "parameters": {"sampling_params": CHEAP}},
    "/encode": {"text": "hello"},
    "/classify": {"text": "hello"},
    "/open_session": {"capacity_of_str_len": 100},
}
GENERATING = tuple(list(WORKING)[:6])

WHOLE = st.sampled_from(
    [
        *(-(2**63), -(2**31), -16, -5, -2, -1, 0, 1, 2, 3, 15, 16, 17, 31, 127, 128, 49151, 49152, 60000, 999_999),
        *(2**30, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    ]
)
REAL = st.sampled_from([-1e308, -2.0, -1.0, -1e-9, 0.0, 1e-300, 1e-9, 1e-6, 0.5, 1.0, 1.5, 2.0, 1e30, 1e39, 1e308]) | (
    st.sampled_from([float("nan"), float("inf"), float("-inf")])
)
TEXT = st.sampled_from(
    [
        *("", " ", "a", "hello there", "\0", "\ud800", "é" * 40, "word " * 300, "x" * 5000, "..", "/", "None", "true"),
        *("1", "(", "(a+)+$", "(?<=a+)b", "[", "a{99999}", "\\", "{}", '{"type": "object"}', '{"$ref": "#"}'),
        "root ::= root",
    ]
)
BOOLEAN = st.booleans()
SCALAR = st.none() | BOOLEAN | WHOLE | REAL | TEXT
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=5
)
LOGIT_BIAS = st.dictionaries(WHOLE.map(str), REAL | WHOLE, max_size=2)
OFTEN = ("sampling_params", "input_ids", "logprob_start_len", "return_logprob", "top_logprobs_num", "logit_bias", "n")
_BY_TYPE = {"integer": WHOLE, "number": REAL | WHOLE, "string": TEXT, "boolean": BOOLEAN, "null": st.none()}


@dataclass(frozen=True)
class Sent:
    """One request of the fuzz."""

    method: str
    path: str
    body: Any

    def text(self) -> str:
        """As it goes over the wire; prints as something to send again."""
        return json.dumps(self.body)


@dataclass
class Api:
    """A server's OpenAPI, as strategies."""

    schema: dict[str, Any]
    routes: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path, methods in self.schema["paths"].items():
            for method, route in methods.items():
                if path not in STOPS_BY_DESIGN:
                    content = route.get("requestBody", {}).get("content", {})
                    self.routes.append((method, path, content.get("application/json", {}).get("schema", {})))

    def requests(self) -> st.SearchStrategy[Sent]:
        """Every route, and those that generate as often as all others together."""
        generating = [route for route in self.routes if route[1] in GENERATING]
        return st.one_of(
            st.sampled_from(self.routes).flatmap(self._request), st.sampled_from(generating).flatmap(self._request)
        )

    def _request(self, route: tuple[str, str, dict[str, Any]]) -> st.SearchStrategy[Sent]:
        method, path, schema = route
        return self._body(path, schema).map(lambda body: Sent(method, path, body))

    def _body(self, path: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        properties = self._resolved(schema).get("properties", {})
        working = WORKING.get(path, {})
        if not properties:
            return st.none() | ANY
        often = [name for name in OFTEN if name in properties]
        names = st.sampled_from([*properties, *often * (len(properties) // 6)])
        changes = st.sets(names, max_size=3).flatmap(
            lambda chosen: st.fixed_dictionaries({name: self._value(name, properties[name]) for name in sorted(chosen)})
        )
        return changes.map(lambda changed: {**working, **changed})

    def _value(self, name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """Of its type, mostly."""
        if name == "sampling_params":
            value = st.one_of(WHOLE, REAL, TEXT, st.lists(WHOLE | TEXT, max_size=3), LOGIT_BIAS, ANY)
            odd = st.dictionaries(st.sampled_from(SAMPLING), value, min_size=1, max_size=2)
            return odd.map(lambda params: {**CHEAP, **params}) | st.lists(odd, max_size=2)
        if name == "logit_bias":
            return LOGIT_BIAS | ANY
        if name in ("input_ids", "prompt", "token_ids_logprob", "tokens"):
            ids = st.lists(st.integers(0, 49151) | WHOLE, max_size=40)
            return ids | st.lists(ids, max_size=3) | TEXT | st.lists(TEXT, max_size=3)
        typed = self._typed(schema, depth=0)
        return st.one_of(typed, typed, typed, ANY)

    def _typed(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
        schema = self._resolved(schema)
        if "enum" in schema or "const" in schema:
            return st.sampled_from(schema.get("enum") or [schema["const"]])
        if depth > 4:
            return SCALAR
        for several in ("anyOf", "oneOf", "allOf"):
            if several in schema:
                return st.one_of([self._typed(option, depth + 1) for option in schema[several]])
        if schema.get("type") == "array":
            return st.lists(self._typed(schema.get("items", {}), depth + 1), max_size=3)
        if schema.get("type") == "object":
            return self._object(schema, depth)
        return _BY_TYPE.get(schema.get("type", ""), ANY)

    def _object(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        if not properties:
            return st.dictionaries(TEXT, SCALAR, max_size=2)
        values = {name: self._typed(properties[name], depth + 1) for name in properties}
        return st.fixed_dictionaries(
            {name: value for name, value in values.items() if name in required},
            optional={name: value for name, value in values.items() if name not in required},
        )

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = self.schema["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
        return self._resolved(options[0]) if len(options) == 1 else schema


class ServerHarmed(AssertionError):
    """The server ended, hangs, answers otherwise than before, or has lost pages; the message has the last bodies."""


class Watch:
    """Sends requests and looks after the server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.harm: ServerHarmed | None = None
        self.recent: list[Sent] = []
        self.statuses: Counter[int] = Counter()
        self.schedulers = list(self._schedulers())
        self.expected = self._answer()

    def send(self, sent: Sent) -> None:
        """Leaves in `harm` what a body, or one of the last, did to the server."""
        self.recent = [*self.recent[-CHECK_EVERY:], sent]
        status = self._status(sent)
        self.statuses[status] += 1
        if sum(self.statuses.values()) % CHECK_EVERY == 0 or status == 0:
            self.check()
        elif any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in self.schedulers):
            self._harmed("the scheduler ended")

    def check(self) -> None:
        """Each page is somewhere, and from an empty store the server answers as at first; else `harm` says what not.

        From an empty one: behind cached pages the prompt is answered from what they keep of it.
        """
        try:
            stats = self.server.store_stats()
            answer = self._answer()
        except requests.RequestException as error:
            return self._harmed(f"no answer: {error!r}")
        if answer != self.expected:
            self._harmed(f"answers {answer}, at first {self.expected}")
        if stats.accounting_errors:
            self._harmed(f"accounting: {stats.accounting_errors}")

    def _status(self, sent: Sent) -> int:
        """0: no answer in time, or a broken connection."""
        path = sent.path.replace("{model}", "m").replace("{response_id}", "r")
        try:
            with requests.request(
                sent.method, self.server.url + path, data=sent.text(), timeout=ANSWER_S, stream=True,
                headers={"content-type": "application/json"},
            ) as response:  # fmt: skip
                for _ in response.iter_content(1 << 16):
                    pass
                return response.status_code
        except requests.RequestException:
            return 0

    def _answer(self) -> list[int]:
        requests.post(self.server.url + f"/flush_cache?timeout={ANSWER_S}", timeout=2 * ANSWER_S).raise_for_status()
        body = {"input_ids": list(range(1000, 1020)), "sampling_params": {**CHEAP, "max_new_tokens": 3}}
        response = requests.post(self.server.url + "/generate", json=body, timeout=ANSWER_S)
        response.raise_for_status()
        return response.json()["output_ids"]

    def _schedulers(self) -> Iterator[psutil.Process]:
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            if "schedul" in process.name() or "schedul" in " ".join(process.cmdline()):
                yield process

    def _harmed(self, what: str) -> None:
        sent = "\n".join(f"{one.method.upper()} {one.path} {one.text()[:2000]}" for one in self.recent)
        self.harm = ServerHarmed(f"{what}; the last bodies, the newest at the end:\n{sent}")


def fuzz(server: Server, bodies: int, number: int) -> Counter[int]:
    """Send so many bodies, drawn from this seed. Returns how often each status came; raises ServerHarmed."""
    schema = requests.get(server.url + "/openapi.json", timeout=ANSWER_S)
    schema.raise_for_status()
    watch = Watch(server)

    @seed(number)
    @settings(
        max_examples=bodies, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(Api(schema.json()).requests())
    def run(sent: Sent) -> None:
        if watch.harm is None:  # Hypothesis would send a failing body again, to a server that is no longer there
            watch.send(sent)

    run()
    if watch.harm is None:
        watch.check()
    if watch.harm:
        raise watch.harm
    return watch.statuses


def main() -> int:
    from sglang_deltastore.host import model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(model_path("smollm2"), ARGUMENTS, log_path=Path(folder) / "log") as server,
    ):
        try:
            statuses = fuzz(server, asked.bodies, asked.seed)
        except ServerHarmed as harm:
            print(f"seed {asked.seed}: {harm}\n\nthe server's log:\n{log_tail(server.log_path, lines=60)}")
            return 1
    print(f"{sum(statuses.values())} bodies, seed {asked.seed}: answered {dict(statuses.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
