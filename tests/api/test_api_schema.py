"""The OpenAPI document, and schemathesis against a real daemon: no 5xx, nothing undocumented."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from relay import tcp_relay

from triarch.testing.daemon_rig import APP_TEMPLATE, SYSTEM_TEMPLATE, DaemonRig

MACHINES = 12
# `down` would end the daemon under test; building runs mmdebstrap against a mirror.
EXCLUDED = ("down", "build_template")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(tmp_path_factory.mktemp("instance"), machines=MACHINES) as rig:
        yield rig


@pytest.fixture(scope="module")
def document(rig: DaemonRig) -> dict[str, Any]:
    with rig.client() as client:
        return dict(json.loads(client.openapi()))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method} {path}", operation


def test_every_route_of_the_contract_is_there(document: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    found = {name.replace("{operation_id}", "{id}") for name, _ in operations(document)}
    verbs = ("start", "stop", "restart", "kill", "pause", "resume", "rename", "switch")
    wanted = {f"post /1/machines/{{name}}/{verb}" for verb in verbs} | {
        "get /1/machines",
        "post /1/machines",
        "get /1/machines/{name}",
        "delete /1/machines/{name}",
        "get /1/machines/{name}/logs",
        "get /1/machines/{name}/usage",
        "get /1/operations/{id}",
        "delete /1/operations/{id}",
        "get /1/templates/{name}",
        "delete /1/templates/{name}",
        "put /1/templates/{name}",
        "post /1/down",
    }
    assert wanted <= found
    for path in ("/1/architectures", "/1/doctor", "/1/operations", "/1/templates"):
        assert f"get {path}" in found
        assert path in text


def test_every_operation_documents_its_refusals(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation["operationId"], name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (name, status)
        assert {"400", "500"} <= operation["responses"].keys(), name


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The same document with names that exist, so that most requests get past the first 404."""
    names = [f"m{index:04}" for index in range(1, MACHINES + 1)]
    for name, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "name" and "/machines/" in name:
                parameter["schema"] = {"type": "string", "enum": [*names, "absent"]}
            if parameter["name"] == "If-Match":
                parameter["schema"] = {"type": "string", "enum": ["*", '"0"']}
            if parameter["name"] == "follow":
                parameter["schema"] = {"type": "boolean", "enum": [False]}
            if parameter["name"] == "wait_seconds":
                parameter["schema"]["maximum"] = 1
    create = document["components"]["schemas"]["CreateMachine"]["properties"]
    create["template"] = {"type": "string", "enum": [SYSTEM_TEMPLATE, APP_TEMPLATE, f"{APP_TEMPLATE}@1", "absent"]}
    create["architecture"] = {"type": "string", "enum": ["fake"]}
    settings = document["components"]["schemas"]["Settings"]["properties"]
    settings["network"] = {"type": "string", "enum": ["none"]}
    for field in ("cpus", "memory_bytes"):
        settings[field] = {"type": "null"}
    return document


def test_schemathesis_finds_nothing(rig: DaemonRig, document: dict[str, Any], tmp_path: Path) -> None:
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(narrowed(document)))
    excluded = [word for name in EXCLUDED for word in ("--exclude-operation-id", name)]
    with tcp_relay(rig.instance.socket_path) as port:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(schema)),
            *("--url", f"http://127.0.0.1:{port}", "--checks", ",".join(CHECKS)),
            *("--max-examples", "12", "--seed", "1", "--request-timeout", "20"),
            *("--suppress-health-check", "all", "--no-color", "--continue-on-failure"),
            *excluded,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:] + rig.log()[-4000:]
    assert "Traceback" not in rig.log()
