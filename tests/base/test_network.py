"""The network interface that ranks on several machines use: the one towards the first, unless somebody has said it."""

from __future__ import annotations

import json
import subprocess

import pytest

from contentv.base import network
from contentv.base.errors import UserError
from contentv.base.network import choose_interface, interface_towards


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "")  # so that the end of the test takes away what is set here
        monkeypatch.delenv(variable)
    for name, value in (("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8"), ("MASTER_ADDR", "10.1.2.3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "interface_towards", lambda host: {"10.1.2.3": "eth7", "127.0.0.1": ""}[host])
    return monkeypatch


def variables() -> dict[str, str]:
    return {name: value for name, value in network.os.environ.items() if name.endswith("_SOCKET_IFNAME")}


def test_several_machines_use_the_interface_towards_the_first(job) -> None:
    assert choose_interface("nccl") == "eth7"
    assert variables() == {"NCCL_SOCKET_IFNAME": "=eth7", "GLOO_SOCKET_IFNAME": "eth7"}


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("gloo", {"GLOO_SOCKET_IFNAME": "eth7"}), ("hccl", {"HCCL_SOCKET_IFNAME": "=eth7", "GLOO_SOCKET_IFNAME": "eth7"})],
)
def test_each_backend_has_its_variable(job, backend, expected) -> None:
    choose_interface(backend)
    assert variables() == expected


def test_what_is_set_is_kept(job) -> None:
    job.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    choose_interface("nccl")
    assert variables() == {"NCCL_SOCKET_IFNAME": "ib0,ib1", "GLOO_SOCKET_IFNAME": "eth7"}


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "8"), ("MASTER_ADDR", "127.0.0.1")])
def test_one_machine_needs_no_choice(job, name, value) -> None:
    job.setenv(name, value)
    assert choose_interface("nccl") == ""
    assert variables() == {}


def test_the_interface_is_the_one_of_the_routing_table() -> None:
    """`ip` as an independent truth; 192.0.2.1 is reserved for documentation, so that the default route is asked."""
    assert interface_towards("127.0.0.1") == ""
    try:
        answer = subprocess.run(
            ["ip", "-json", "route", "get", "192.0.2.1"], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no `ip`, or no route away from this machine")
    route = json.loads(answer)[0]
    assert interface_towards("192.0.2.1") == route["dev"]
    assert interface_towards(route["prefsrc"]) == route["dev"]  # the first machine itself


def test_an_address_that_leads_nowhere_is_named() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        interface_towards("no-such-host.invalid")
