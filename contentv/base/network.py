"""Which network interface the ranks of several machines talk through."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct

from contentv.base.errors import UserError
from contentv.base.log import get_logger

SIOCGIFADDR = 0x8915  # Linux: the address of an interface
# NCCL and HCCL take names as prefixes, unless they begin with "=".
VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME={}", "nccl": "NCCL_SOCKET_IFNAME=={}", "hccl": "HCCL_SOCKET_IFNAME=={}"}


def choose_interface(backend: str) -> str:
    """Returns the interface that this job's ranks are told to use, or nothing where there is nothing to choose.

    On several machines it is the one towards MASTER_ADDR. Left to themselves, gloo takes the one that the machine's
    own name resolves to, and NCCL and HCCL the first that is up, which may be a container bridge that leads nowhere.
    Variables that are set already are kept, and a loopback address says nothing.

    Args:
        backend: gloo, nccl or hccl.

    Raises:
        UserError: MASTER_ADDR does not resolve.
    """
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    wanted = [VARIABLES[name].partition("=") for name in dict.fromkeys((backend, "gloo"))]
    unset = [(variable, value) for variable, _, value in wanted if variable not in os.environ]
    if ranks <= here or "MASTER_ADDR" not in os.environ or not unset:
        return ""
    name = interface_towards(os.environ["MASTER_ADDR"])
    if name:
        os.environ.update({variable: value.format(name) for variable, value in unset})
        get_logger().info("network: %s, towards %s", name, os.environ["MASTER_ADDR"])
    return name


def interface_towards(host: str) -> str:
    """Returns the interface whose address this machine uses towards a host; nothing for loopback and IPv6 addresses.

    Raises:
        UserError: the host's name does not resolve, or no route leads there.
    """
    try:
        address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
            probe.connect(address[4])  # a datagram socket: nothing is sent
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f'"{host}" cannot be reached ({error})', where="MASTER_ADDR",
            remedy="set MASTER_ADDR to an address of the first node that all nodes can reach",
        ) from error  # fmt: skip
    found = ipaddress.ip_address(own.partition("%")[0])
    if found.is_loopback or found.version == 6:
        return ""
    return next((name for _, name in socket.if_nameindex() if _address(name) == own), "")


def _address(interface: str) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
        except OSError:  # it has no address
            return ""
    return socket.inet_ntoa(answer[20:24])
