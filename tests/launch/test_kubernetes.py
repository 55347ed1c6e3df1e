"""launch/kubernetes.yaml against the fields of Kubeflow's PyTorchJob, and launch/pod.sh with what the operator sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_slurm import free_ports

from contentv.config.compose import load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

# The part of the schema that the manifest may use: the CRD kubeflow.org_pytorchjobs.yaml of the Training Operator 1.9.
# A dict gives the known fields, a list its items' fields, a type the value's; `any` is not looked into.
STRINGS = {"*": str}
CONTAINER = {
    "name": str, "image": str, "imagePullPolicy": str, "command": [str], "args": [str], "workingDir": str,
    "env": [{"name": str, "value": str, "valueFrom": any}], "ports": [{"name": str, "containerPort": int}],
    "resources": {"limits": any, "requests": any},
    "securityContext": {"capabilities": {"add": [str], "drop": [str]}, "privileged": bool, "runAsUser": int},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
}  # fmt: skip
VOLUME = {
    "name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": str}, "hostPath": {"path": str, "type": str},
}  # fmt: skip
POD = {
    "containers": [CONTAINER], "initContainers": [CONTAINER], "volumes": [VOLUME], "hostNetwork": bool, "hostIPC": bool,
    "terminationGracePeriodSeconds": int, "nodeSelector": STRINGS, "tolerations": any, "priorityClassName": str,
    "schedulerName": str, "serviceAccountName": str, "imagePullSecrets": [{"name": str}], "affinity": any,
}  # fmt: skip
REPLICA = {
    "replicas": int, "restartPolicy": str,
    "template": {"metadata": {"annotations": STRINGS, "labels": STRINGS}, "spec": POD},
}  # fmt: skip
RUN_POLICY = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "cleanPodPolicy": str, "managedBy": str, "schedulingPolicy": any,
    "suspend": bool, "ttlSecondsAfterFinished": int,
}  # fmt: skip
JOB = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "namespace": str, "labels": STRINGS},
    "spec": {"nprocPerNode": str, "runPolicy": RUN_POLICY, "pytorchReplicaSpecs": {"*": REPLICA}},
}  # fmt: skip


def check(value: Any, schema: Any, path: str = "") -> list[str]:
    """Returns what in a manifest its schema does not know."""
    if schema is any:
        return []
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is no mapping"]
        unknown = [f"{path}.{key}" for key in value if key not in schema and "*" not in schema]
        known = [(key, schema.get(key, schema.get("*"))) for key in value if f"{path}.{key}" not in unknown]
        return unknown + [fault for key, inner in known for fault in check(value[key], inner, f"{path}.{key}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [fault for i, item in enumerate(value) for fault in check(item, schema[0], f"{path}[{i}]")]
    return [] if type(value) is schema else [f"{path} is {value!r}, no {schema.__name__}"]


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_the_manifest_has_the_fields_of_the_custom_resource(job) -> None:
    assert check(job, JOB) == []
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec: spec.update(nprocPerNode=8), ".spec.nprocPerNode is 8, no str"),
        (lambda spec: spec.update(replicas=2), ".spec.replicas"),
        (
            lambda spec: spec["pytorchReplicaSpecs"]["Worker"].update(replica=1),
            ".spec.pytorchReplicaSpecs.Worker.replica",
        ),
    ],
)
def test_mistakes_in_the_manifest_would_be_seen(job, change, fault) -> None:
    change(job["spec"])
    assert check(job, JOB) == [fault]


def test_the_manifest_passes_what_the_operators_webhook_checks(job) -> None:
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    assert job["metadata"]["name"].isalnum()
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        assert "restartPolicy" not in replica["template"]["spec"]  # overridden, with a warning
        container = next(c for c in replica["template"]["spec"]["containers"] if c["name"] == "pytorch")
        assert container["image"]
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


def test_the_manifests_command_is_one_of_ours(job) -> None:
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    script, command = container["command"]
    assert os.access(ROOT / script, os.X_OK)
    load_config(command, container["args"])


# Stands for contentv in the pods: says who it is, and meets the others.
RANK = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
names = "RANK LOCAL_RANK WORLD_SIZE GROUP_RANK OMP_NUM_THREADS"
line = " ".join(os.environ[name] for name in names.split()) + "\\n"
os.write(1, line.encode())  # in one piece: the ranks of a pod share its output, and print writes word by word
dist.barrier()
"""


@pytest.mark.dist
def test_two_pods_become_one_job_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "contentv.py").write_text(RANK)
    (port,) = free_ports(1)
    operator = {
        "MASTER_ADDR": "127.0.0.1", "PET_MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "PET_MASTER_PORT": str(port), "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "2", "WORLD_SIZE": "4", "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    pods = [
        subprocess.Popen(
            [LAUNCH / "pod.sh", "train"], env={**os.environ, **operator, "RANK": str(n), "PET_NODE_RANK": str(n)},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in (1, 0)
    ]  # fmt: skip
    results = [pod.communicate(timeout=240) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], results
    assert sorted(results[1][0].splitlines()) == ["0 0 4 0 1", "1 1 4 0 1"]
    assert sorted(results[0][0].splitlines()) == ["2 0 4 1 1", "3 1 4 1 1"]


def test_a_pod_without_the_operator_says_what_is_missing() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
    done = subprocess.run([LAUNCH / "pod.sh", "train"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "launch/kubernetes.yaml" in done.stderr
