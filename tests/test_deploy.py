"""Container, compose and Kubernetes files say what the server has."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")))


def test_kubernetes_probes_ask_the_server_s_own_routes() -> None:
    deployment, service, budget = _documents("deploy/kubernetes.yaml")
    assert [part["kind"] for part in (deployment, service, budget)] == [
        "Deployment",
        "Service",
        "PodDisruptionBudget",
    ]
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    paths = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    assert paths == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    labels = pod["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    drain = container["args"][container["args"].index("--drain-s") + 1]
    assert float(drain) < pod["spec"]["terminationGracePeriodSeconds"]


def test_compose_and_image_agree() -> None:
    (compose,) = _documents("compose.yaml")
    service = compose["services"]["lazyahead"]
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "EXPOSE 8000" in image
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert "VOLUME /models" in image
    assert service["volumes"] == ["models:/models"]
    assert set(compose["volumes"]) == {"models"}


def test_the_image_copies_what_the_package_needs_and_runs_as_no_root() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        name for line in re.findall(r"^COPY (.+)$", image, re.M) for name in line.split()[:-1]
    }
    assert {"pyproject.toml", "README.md", "src", "constraints.txt"} <= copied
    for name in copied:
        assert (ROOT / name).exists()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not copied & set(ignored)
    assert image.index("USER 10001") < image.index("ENTRYPOINT")
    assert re.search(r"^ARG BASE=\S+$", image, re.M)
