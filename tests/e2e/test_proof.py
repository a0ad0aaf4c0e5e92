"""Asked for and not in force = the server stops with the reason. Mode none = nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_deltastore.host.server_process import ServerFailed
from tests.e2e.client import generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer, draft_model, or_long

pytestmark = pytest.mark.slow

SMALL = ("--max-total-tokens", "1024", "--max-running-requests", "2")

#: Python runs a sitecustomize at the start of every process, so these reach the scheduler as well.
SABOTAGE = {
    "a hook that does not apply": (
        "import sglang_deltastore.seam.targets as targets\n"
        "targets.BUILD_POOL += '_renamed'\n"
        "targets.SCHEDULER_HOOKS = tuple(\n"
        "    targets.BUILD_POOL if '_build_token_to_kv_pool' in name else name for name in targets.SCHEDULER_HOOKS)\n",
        "these hooks did not apply, see the log above: ['sglang.srt.mem_cache.kv_cache_configurator."
        "KVCacheConfigurator._build_token_to_kv_pool_renamed']",
    ),
    "a scheduler without the plugin": (
        "import sys\n"
        "if 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    import os; os.environ['SGLANG_PLUGINS'] = 'another-plugin'\n",
        "Invalid attention backend: deltastore",
    ),
    "a scheduler that proves nothing": (
        "import sglang_deltastore.seam.proof as proof\nproof.add_proof = lambda info, scheduler: info\n",
        "deltastore asked for, but scheduler 0 did not prove that it is in force",
    ),
    "a tree of another class": (
        "import sglang_deltastore.seam.tree as tree\n"
        "from sglang.srt.mem_cache.registry import create_unified_radix_cache\n"
        "tree.create_tree = create_unified_radix_cache\n",
        "deltastore asked for, but SGLang built UnifiedRadixCache as radix tree, not DeltaRadixCache",
    ),
    "a draft model's KV that nobody has counted": (
        "import sglang_deltastore.seam.deployment as deployment\ndeployment.draft_pool_token_bytes = lambda kvc: 0\n",
        "deltastore counted 0 bytes for the draft model's own KV, but 47923200 bytes are allocated",
    ),
}

#: of the others one is caught by the same check as a draft model's KV, and one by SGLang itself
SHORT = ("a hook that does not apply", "a scheduler that proves nothing", "a draft model's KV that nobody has counted")


@pytest.mark.parametrize("how", or_long(list(SABOTAGE), SHORT))
def test_a_broken_installation_does_not_serve(
    how: str, start_server: StartServer, tmp_path: Path, smollm2: Path
) -> None:
    code, reason = SABOTAGE[how]
    (tmp_path / "sitecustomize.py").write_text(code)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with pytest.raises(ServerFailed) as failure:
        start_server(*DELTASTORE, *SMALL, *draft_model(smollm2) * ("draft" in how), environ=environ)
    log = str(failure.value)
    assert reason in log
    assert "The server is fired up" not in log


def test_mode_none_changes_nothing(start_server: StartServer) -> None:
    """The same output tokens as a process in which the plugin is not loaded at all."""
    stock = ("--attention-backend", "torch_native", *SMALL)
    without = start_server(*stock, environ={**os.environ, "SGLANG_PLUGINS": "another-plugin"})
    installed = start_server(*stock)
    for length in (5, 120, 400):
        tokens = prompt(length, seed=length)
        answers = [generate(server, tokens, tokens=16)["output_ids"] for server in (without, installed)]
        assert answers[0] == answers[1]
    assert "deltastore" not in installed.log_path.read_text().replace("sglang_deltastore", "").split("server_args=")[0]


def test_offline_engine(smollm2: Path) -> None:
    """`Engine(kv_compress=..., kv_compress_tier=...)`, in a process of its own."""
    code = f"""
if __name__ == "__main__":
    from sglang_deltastore.host import activate
    activate()
    import sglang
    engine = sglang.Engine(
        model_path={str(smollm2)!r}, device="cpu", dtype="float32", max_total_tokens=1024,
        max_running_requests=2, kv_compress="deltastore", kv_compress_tier="k4v2",
    )
    sampling_params = {{"temperature": 0, "max_new_tokens": 4}}
    answer = engine.generate(input_ids=list(range(1000, 1100)), sampling_params=sampling_params)
    state = engine.get_server_info()["internal_states"][0]["deltastore"]
    print("RESULT", answer["meta_info"]["completion_tokens"], state["tier"], state["accounting_errors"])
    engine.shutdown()
"""
    script = smollm2.parent / "engine_test.py"
    script.write_text(code)
    try:
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    finally:
        script.unlink()
    assert "RESULT 4 k4v2 []" in done.stdout, done.stderr[-3000:]
