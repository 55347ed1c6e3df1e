"""Where a Ray cluster's head is, and whether it answers: Ray itself tries for five minutes, then ends the process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from contentv.base.errors import UserError

KEY = "ray_address"


def joined_here() -> str:
    """Returns the address of the cluster that `ray start` last made this machine a node of; empty if there is none."""
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def answers(address: str, wait_s: float) -> bool:
    """Whether `require_head` passes."""
    try:
        require_head(address, wait_s)
    except UserError:
        return False
    return True


def require_head(address: str, wait_s: float) -> None:
    """Passes if something that speaks HTTP/2, as Ray's head does, answers.

    Args:
        address: HOST:PORT.
        wait_s: longest wait, in seconds.

    Raises:
        UserError: nothing does, or the address has another form.
    """
    host, _, port = address.rpartition(":")
    remedy = (
        "give HOST:PORT of the cluster's head, such as 10.0.0.1:6379, or auto; `ray status` there shows whether it runs"
    )
    if "://" in address or not host or not port.isdigit():
        raise UserError(f'"{address}" is not an address of the form HOST:PORT', where=KEY, remedy=remedy)
    opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # preface and empty SETTINGS
    try:
        with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
            connection.settimeout(wait_s)
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                connection.sendall(opening)
                answer = connection.recv(9)
                if len(answer) < 4 or answer[3] != 4:  # the type of a frame; 4 = SETTINGS, a server's first
                    raise OSError("what listens there is not Ray")
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}", where=KEY, remedy=remedy) from error
