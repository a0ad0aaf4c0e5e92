"""docker/compose.yaml and what it mounts, where no Docker engine runs: what one file names is in the others, and a
server serves with the options that it gives."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from sglang_router.router_args import RouterArgs

from sglang_deltastore.host.server_process import serve
from sglang_deltastore.observe import series
from tests.test_docker import DOCKERFILES, ROOT, values

FOLDER = ROOT / "docker"
HOME = "/home/deltastore"
TIMEOUT_S = 120


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


SERVICES: dict[str, dict[str, Any]] = read("compose.yaml")["services"]
SERVERS = {name: service for name, service in SERVICES.items() if "build" in service}
MOUNTS = [mount.split(":") for service in SERVICES.values() for mount in service.get("volumes", [])]
"""What, where, and perhaps "ro"."""


def addresses() -> set[str]:
    [port] = {port for dockerfile in DOCKERFILES for port in values(dockerfile, "EXPOSE")}
    return {f"{name}:{port}" for name in SERVERS}


def test_images_are_built_here_or_have_a_version() -> None:
    built = {service["image"] for service in SERVERS.values()}
    for service in SERVERS.values():
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    others = {service["image"] for service in SERVICES.values()} - built
    assert [image for image in others if not re.search(r":v?\d+\.\d+", image)] == []


def test_what_is_mounted_is_there() -> None:
    volumes = {mount[0] for mount in MOUNTS if not mount[0].startswith(".")}
    assert volumes == set(read("compose.yaml")["volumes"])
    files = [mount for mount in MOUNTS if mount[0].startswith(".")]
    assert [mount for mount in files if not (FOLDER / mount[0]).is_file() or mount[2:] != ["ro"]] == []


def test_folders_that_servers_write_to_belong_to_their_user() -> None:
    """A volume takes the owner of the image's folder, root where there is none. `deltastore model` makes the cache."""
    [made] = [line for line in values(FOLDER / "Dockerfile.cpu", "RUN") if line.startswith("mkdir")]
    assert values(FOLDER / "Dockerfile.cpu", "WORKDIR")[-1] == HOME
    folders = {mount.split(":")[1] for service in SERVERS.values() for mount in service["volumes"]}
    assert folders == {f"{HOME}/{folder}" for folder in (made.split("&&")[0].split()[1], ".cache")}
    assert "deltastore model" in made


def test_nothing_is_open_to_the_network() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_router_and_prometheus_know_every_server() -> None:
    assert SERVICES["router"]["entrypoint"] == ["python3", "-m", "sglang_router.launch_router"]
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    given = parser.parse_args(SERVICES["router"]["command"])
    assert {url.removeprefix("http://") for url in given.worker_urls} == addresses()
    assert set(SERVICES["router"]["depends_on"]) == set(SERVERS)
    [job] = read("prometheus.yaml")["scrape_configs"]
    assert {target for each in job["static_configs"] for target in each["targets"]} == addresses()


def test_alerts_are_mounted_and_ask_for_series_that_there_are() -> None:
    mounted = {mount[0]: Path(mount[1]) for mount in MOUNTS}
    [rules] = read("prometheus.yaml")["rule_files"]
    assert mounted["./alerts.yaml"] == mounted["./prometheus.yaml"].parent / rules
    alerts = [rule for group in read("alerts.yaml")["groups"] for rule in group["rules"]]
    asked = [rule["expr"] for rule in alerts]
    assert series.CANARY_KL in series.description(asked), "a series that there is not raises KeyError"
    sizes = {size for expression in asked for size in re.findall(r'memory="([^"]+)"', expression)}
    assert sizes and sizes <= set(series.LABELLED["hit_rate"].values())
    told = (ROOT / "docs/observing.md").read_text()
    assert [rule["alert"] for rule in alerts if f"`{rule['alert']}`" not in told] == [], "what to do is told of each"


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    [source] = read("grafana/datasource.yaml")["datasources"]
    assert source["type"] == "prometheus" and source["url"].removeprefix("http://").split(":")[0] in SERVICES
    [provider] = read("grafana/dashboards.yaml")["providers"]
    [shown] = [where for what, where, *_ in MOUNTS if what == "./grafana-dashboard.json"]
    assert Path(shown).parent == Path(provider["options"]["path"])


@pytest.mark.slow
def test_a_server_serves_with_its_options(tmp_path: Path, smollm2: Path) -> None:
    [options] = {tuple(service["command"]) for service in SERVERS.values()}
    ours = [option.replace(HOME, str(tmp_path)) for option in options]
    base = ("--device", "cpu", "--dtype", "float32", "--kv-compress", "deltastore")
    with serve(smollm2, (*base, *ours), log_path=tmp_path / "log") as server:
        body = {"input_ids": list(range(1000, 1600)), "sampling_params": {"max_new_tokens": 4}}
        requests.post(f"{server.url}/generate", json=body, timeout=TIMEOUT_S).raise_for_status()
        until = time.monotonic() + TIMEOUT_S
        while not server.store_stats().storage_written_pages:
            assert time.monotonic() < until, "no page was written"
            time.sleep(0.5)
        assert list((tmp_path / "pages").rglob("*.bin"))
        assert "deltastore:stored_tokens" in requests.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
