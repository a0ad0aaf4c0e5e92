"""A folder of workloads in the form of the public ones, small and made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zstandard

TOOLS = {
    "Files": [{"name": name, "description": f"{name} a file " * 20} for name in ("list", "copy", "move")],
    "Trade": [{"name": name, "description": f"{name} some shares " * 20} for name in ("buy", "sell", "quote")],
}
REPLIES = 3
MOONCAKE_IDS = [[0, 1], [2, 3], [0, 1, 4], [5, 6], [2, 3, 7], [5, 6, 8], [9, 10]]


def write_workloads(folder: Path) -> Path:
    """tau_bench/, bfcl/, chat/, mooncake/: twelve conversations each, of four turns."""
    for name in ("tau_bench", "bfcl", "chat", "mooncake"):
        (folder / name).mkdir(parents=True)
    agent = {"domain": "airline", "policy": "Never cancel a flight. " * 40, "tools": TOOLS["Files"]}
    (folder / "tau_bench/airline_policy_tools.json").write_text(json.dumps(agent))
    _write(
        folder / "tau_bench/airline_x_trajectories.jsonl.zst",
        [{"task_id": number, "messages": _conversation(number)} for number in range(12)],
    )
    (folder / "bfcl/function_docs.json").write_text(json.dumps(TOOLS))
    (folder / "bfcl/system_prompt.txt").write_text("Call functions.\n{functions}\n")
    _write(folder / "bfcl/multi_turn.jsonl.zst", [_tool_session(number) for number in range(12)])
    _write(folder / "chat/oasst_trees.jsonl.zst", [{"id": str(number), "tree": _tree(number)} for number in range(12)])
    dialogue = [{"user": "How are you today?", "bot": "Very well, thank you. " * 4}] * 3
    _write(
        folder / "chat/mt_bench_101.jsonl.zst",
        [
            {"id": number, "history": [{"user": f"I am number {number}.", "bot": "Hello!"}, *dialogue]}
            for number in range(99)
        ],
    )
    _write(
        folder / "mooncake/conversation_trace.jsonl.zst",
        [
            {"timestamp": 1000 * number, "input_length": 512 * len(ids), "output_length": 9, "hash_ids": ids}
            for number, ids in enumerate(MOONCAKE_IDS)
        ],
    )
    return folder


def _conversation(number: int) -> list[dict[str, Any]]:
    messages = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"This is user {number}, and my wish {turn} is another flight."})
        messages.append({"role": "assistant", "content": f"Your wish {turn}, user {number}, is granted."})
    return messages


def _tool_session(number: int) -> dict[str, Any]:
    turns = [[{"role": "user", "content": f"Do thing {turn} for user {number}."}] for turn in range(4)]
    calls = [[f"list(folder={turn})", f"copy(user={number})"] for turn in range(4)]
    tools = ["Files"] if number % 2 else ["Trade"]
    return {"involved_classes": tools, "excluded_function": ["move"], "turns": turns, "ground_truth": calls}


def _tree(number: int) -> dict[str, Any]:
    def answers(text: str, below: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "text": f"{text}, answer {index}", "replies": below if index == 0 else []}
            for index in range(REPLIES)
        ]

    deeper = {"role": "user", "text": "And what then?", "replies": answers("Then", [])}
    return {"role": "user", "text": f"Question {number}?", "replies": answers("First", [deeper])}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
