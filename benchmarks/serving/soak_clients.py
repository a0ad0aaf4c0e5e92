"""The clients of a soak: threads that each do one thing after another, drawn from a seed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import requests

from .client import TIMEOUT_S, ask, body, chunks, flush
from .workloads import Prompt, words

LONGEST_PROMPT_TOKENS, CONVERSATIONS = 420, 24
SHORT_ANSWER, LONG_ANSWER = (3, 24), (60, 100)
"""Tokens; long ones fill the pool while they run."""
PROBE_NATS = 0.5
"""Mean |difference| of log-probabilities between an idle server and a busy one. Chunks end elsewhere in a batch, so
other tokens are read packed: up to 0.3 on random words with K4V3; another context, as after a wrong page, costs 2 and
more."""

#: a client in a process of its own, which says when its answer has begun
_CLIENT = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.stdin.buffer.read(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    for line in answer:
        print("got", len(line), flush=True)
"""


@dataclass(frozen=True)
class Probe:
    """A prompt, and what an idle server makes of it: cold and behind its own cached pages, and the log-probabilities of
    its second half."""

    prompt: Prompt
    cold_ids: list[int]
    hit_ids: list[int]
    logprobs: list[float]

    @classmethod
    def ask_idle(cls, url: str, prompt: Prompt, answer_tokens: int) -> Probe:
        flush(url)
        logprobs = score(url, prompt)
        flush(url)
        cold, hit = (ask(url, prompt, answer_tokens).output_ids for _ in range(2))
        return cls(prompt, cold, hit, logprobs)

    def differences(self, other: Probe) -> str:
        """What is not the same, to the last bit; empty where all is."""
        found = [
            f"{name} {getattr(other, name)[:4]}..., before {getattr(self, name)[:4]}..."
            for name in vars(self)
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(found)


def score(url: str, prompt: Prompt) -> list[float]:
    """Log-probabilities of the prompt's second half."""
    sent = {**body(prompt, 1), "stream": False, "return_logprob": True, "logprob_start_len": len(prompt) // 2}
    response = requests.post(url + "/generate", json=sent, timeout=TIMEOUT_S)
    response.raise_for_status()
    return [entry[0] for entry in response.json()["meta_info"]["input_token_logprobs"][1:]]


class Clients:
    """`begin` lets them send, `pause` waits until none does, `server_goes` excuses what fails from now on, of requests
    already sent. `counts`: what they did; `failures`: what must not have happened."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.url = url
        self.probes: list[Probe] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.worst_probe_nats = 0.0
        self._state = threading.Condition()
        self._going, self._stopping, self._active, self._generation = False, False, 0, 0
        self._conversations: list[Prompt] = []
        self._shuffle = random.Random(seed)
        self._deeds: list[Callable[[random.Random], None]] = []
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed} {number}"),), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self) -> None:
        with self._state:
            self._going = True
            self._state.notify_all()

    def pause(self, timeout_s: float) -> bool:
        """Whether all requests ended in time."""
        with self._state:
            self._going = False
            return self._state.wait_for(lambda: self._active == 0, timeout_s)

    def server_goes(self) -> None:
        with self._state:
            self._going = False
            self._generation += 1

    def stop(self) -> None:
        with self._state:
            self._stopping = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join(timeout=60)

    def _work(self, pick: random.Random) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._going or self._stopping)
                if self._stopping:
                    return
                self._active += 1
                generation = self._generation
            deed = self._next_deed()
            try:
                deed(pick)
            except Exception as error:  # whatever it was, it is a finding, unless the server was taken away
                if self._generation == generation:
                    self.failures.append(f"{deed.__name__.strip('_')}: {type(error).__name__}: {error}")
                else:
                    self._count("cut_off_by_restart")
            finally:
                with self._state:
                    self._active -= 1
                    self._state.notify_all()

    def _next_deed(self) -> Callable[[random.Random], None]:
        """Everything comes soon: a bag of deeds is shuffled, and emptied before the next."""
        with self._state:
            if not self._deeds:
                common = [self._turn] * 6 + [self._branch] * 3 + [self._long] * 4
                faults = [self._hang_up, self._abort, self._probe] * 2 + [self._killed, self._flush]
                self._deeds = self._shuffle.sample(common + faults, len(common + faults))
            return self._deeds.pop()

    def _turn(self, pick: random.Random) -> None:
        self._converse(pick, self._known(pick), pick.randint(*SHORT_ANSWER))
        self._count("turns")

    def _branch(self, pick: random.Random) -> None:
        """Another continuation from somewhere within a conversation."""
        known = self._known(pick)
        self._converse(pick, known[: pick.randint(0, len(known))], pick.randint(*SHORT_ANSWER))
        self._count("branches")

    def _long(self, pick: random.Random) -> None:
        self._converse(pick, self._known(pick), pick.randint(*LONG_ANSWER))
        self._count("long_answers")

    def _hang_up(self, pick: random.Random) -> None:
        """Close the connection within an answer."""
        enough = pick.randint(1, 12)
        sent = body(self._prompt(pick), pick.randint(*LONG_ANSWER))
        with requests.post(self.url + "/generate", json=sent, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            for number, _ in enumerate(chunks(response)):
                if number >= enough:
                    break
        self._count("hung_up")

    def _abort(self, pick: random.Random) -> None:
        """Take a request back within its answer; the rest of the answer must come to an end."""
        rid, last = uuid.UUID(int=pick.getrandbits(128)).hex, {}
        sent = body(self._prompt(pick), pick.randint(*LONG_ANSWER), rid=rid)
        with requests.post(self.url + "/generate", json=sent, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            for number, chunk in enumerate(chunks(response)):
                if number == 1:
                    requests.post(self.url + "/abort_request", json={"rid": rid}, timeout=60).raise_for_status()
                last = chunk
        reason = last["meta_info"]["finish_reason"]["type"]
        if reason not in ("abort", "length"):
            raise RuntimeError(f"an aborted request ended with {reason!r}")
        self._count("aborted" if reason == "abort" else "aborted_too_late")

    def _killed(self, pick: random.Random) -> None:
        """A client process that dies by SIGKILL within its answer."""
        command = [sys.executable, "-S", "-c", _CLIENT, self.url + "/generate"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            process.stdin.write(json.dumps(body(self._prompt(pick), LONG_ANSWER[1])).encode())
            process.stdin.close()
            begun = process.stdout.readline()
            process.kill()
        if not begun:
            raise RuntimeError("a client in a process of its own got no answer")
        self._count("killed")

    def _flush(self, _pick: random.Random) -> None:
        """SGLang refuses while requests run, and must go on either way."""
        response = requests.post(self.url + "/flush_cache", timeout=60)
        if response.status_code not in (200, 400):
            response.raise_for_status()
        self._count("flushes")
        time.sleep(0.2)

    def _probe(self, pick: random.Random) -> None:
        probe = pick.choice(self.probes)
        found = score(self.url, probe.prompt)
        nats = sum(abs(a - b) for a, b in zip(found, probe.logprobs, strict=True)) / len(found)
        self.worst_probe_nats = max(self.worst_probe_nats, nats)
        if not nats < PROBE_NATS:  # a NaN must fail
            raise RuntimeError(f"a probe of {len(probe.prompt)} tokens differs by {nats:.3f} nats from an idle server")
        self._count("probes")

    def _converse(self, pick: random.Random, known: Prompt, answer_tokens: int) -> None:
        prompt = known + words(pick.randint(1, 60), pick)
        whole = prompt + ask(self.url, prompt, answer_tokens).output_ids
        with self._state:
            if len(whole) < LONGEST_PROMPT_TOKENS:
                self._conversations.append(whole)
            del self._conversations[:-CONVERSATIONS]

    def _prompt(self, pick: random.Random) -> Prompt:
        return self._known(pick) + words(pick.randint(1, 60), pick)

    def _known(self, pick: random.Random) -> Prompt:
        """A conversation so far, or none."""
        with self._state:
            return pick.choice(self._conversations) if self._conversations and pick.random() < 0.8 else []

    def _count(self, name: str) -> None:
        with self._state:
            self.counts[name] += 1
