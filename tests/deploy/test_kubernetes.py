"""The Kubernetes base: it renders, Kubernetes' schema accepts it, its parts fit together and fit the daemons."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from common.config import JobSpec
from common.errors import EXIT_CHECKPOINT, EXIT_MISMATCH, EXIT_NOT_AUTHORIZED, EXIT_RETRY, EXIT_TERMINATED, EXIT_USAGE
from common.spec_sources import load_job_spec
from deploy.cli import RESERVED
from tests.deploy.test_cli import calls, datps

__all__ = ["calls"]
ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy/kubernetes/base"
pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def rendered() -> dict[str, dict[str, Any]]:
    """The base's resources by kind."""
    ended = subprocess.run(["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return {resource["kind"]: resource for resource in yaml.safe_load_all(ended.stdout)}


def pod(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = rendered()[kind]["spec"]["template"]["spec"]
    return spec


def labels(kind: str) -> dict[str, str]:
    return dict(rendered()[kind]["spec"]["template"]["metadata"]["labels"])


def container(kind: str) -> dict[str, Any]:
    (only,) = pod(kind)["containers"]
    return dict(only)


def variables(kind: str) -> dict[str, str | None]:
    return {each["name"]: each.get("value") for each in container(kind)["env"]}


def job() -> JobSpec:
    return load_job_spec(yaml_text=rendered()["ConfigMap"]["data"]["job.yaml"], yaml_name="job.yaml")


def test_the_base_has_a_resource_of_each_kind() -> None:
    assert rendered().keys() == {"ConfigMap", "Service", "StatefulSet", "Job"}


@pytest.mark.parametrize("kind", ["ConfigMap", "Service", "StatefulSet", "Job"])
def test_kubernetes_accepts_it_strictly(kind: str) -> None:
    kubernetes_validate.validate(rendered()[kind], kubernetes_validate.latest_version(), strict=True)


def test_the_job_spec_has_as_many_servers_and_workers_as_there_are_pods() -> None:
    workers = rendered()["Job"]["spec"]

    assert job().servers == rendered()["StatefulSet"]["spec"]["replicas"]
    assert job().workers == workers["completions"] == workers["parallelism"]
    assert workers["completionMode"] == "Indexed"


def test_every_shard_has_an_address_by_its_service() -> None:
    service, servers = rendered()["Service"], rendered()["StatefulSet"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]

    addresses = [f"{servers['metadata']['name']}-{shard}.{name}:{port}" for shard in range(job().servers)]

    assert variables("StatefulSet")["DATPS_SHARD_ADDRESSES"] == ",".join(addresses)
    assert variables("Job")["DATPS_SERVER"] == addresses[0]
    assert servers["spec"]["serviceName"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = servers["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert (
        not service["spec"]["selector"].items() <= rendered()["Job"]["spec"]["template"]["metadata"]["labels"].items()
    )


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_variables_are_those_that_the_daemons_know(kind: str) -> None:
    ours = {name for name in variables(kind) if name.startswith("DATPS_")}

    assert ours <= RESERVED
    assert pod(kind)["enableServiceLinks"] is False


def test_a_pods_index_is_its_shard_or_the_number_in_its_worker_id() -> None:
    (shard,) = (each for each in container("StatefulSet")["env"] if each["name"] == "DATPS_SHARD")
    names = list(variables("Job"))

    assert shard["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert variables("Job")["DATPS_WORKER_ID"] == "worker-$(JOB_COMPLETION_INDEX)"
    assert names.index("JOB_COMPLETION_INDEX") < names.index("DATPS_WORKER_ID")


def test_a_worker_saves_and_looks_for_all_that_it_alone_has_in_one_folder_of_its_own(calls: list[Any]) -> None:
    """Residuals beside the checkpoints that they belong to: whatever volume keeps the ones keeps the others."""
    given: dict[str, str] = {}
    for each in container("Job")["env"]:  # as Kubernetes does: what stands before may be referred to
        value = each.get("value", "3")
        given[each["name"]] = re.sub(r"\$\((\w+)\)", lambda reference: given.get(reference[1], reference[0]), value)

    ended = datps(*container("Job")["args"], **given)

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert options.worker_id == "worker-3"
    assert options.out == options.resume == Path("/out/worker-3")
    assert options.state.parent == options.out


def test_mistakes_end_the_job_and_lost_peers_do_not() -> None:
    policy = rendered()["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in policy if "onExitCodes" in rule}

    assert codes["FailJob"] == [EXIT_USAGE, EXIT_CHECKPOINT, EXIT_MISMATCH, EXIT_NOT_AUTHORIZED]
    assert codes["Count"] == [EXIT_RETRY, EXIT_TERMINATED]
    assert pod("Job")["restartPolicy"] == "Never"


def test_servers_are_probed_on_the_port_they_listen_on() -> None:
    server = container("StatefulSet")
    (port,) = server["ports"]

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["grpc"]["port"] == port["containerPort"] == 50051


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_pods_run_without_privileges_on_a_read_only_root(kind: str) -> None:
    security = container(kind)["securityContext"]
    mounts = container(kind)["volumeMounts"]
    writable = {mount["mountPath"]: mount["name"] for mount in mounts if not mount.get("readOnly")}
    empty = {volume["name"] for volume in pod(kind)["volumes"] if "emptyDir" in volume}

    assert pod(kind)["securityContext"]["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert writable.keys() == ({"/tmp"} if kind == "StatefulSet" else {"/tmp", "/out"})
    assert set(writable.values()) == empty
    assert container(kind)["resources"].keys() == {"requests", "limits"}


def test_the_image_runs_as_the_pods_do() -> None:
    user = pod("Job")["securityContext"]["runAsUser"]

    assert f"USER {user}:{user}\n" in (ROOT / "deploy/Dockerfile").read_text()
