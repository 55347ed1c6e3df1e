"""One writer per folder, also when the first was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.base.lock import lock_folder

HOLD = """
import sys, time
from pathlib import Path
from contentv.base.lock import lock_folder
lock_folder(Path(sys.argv[1]), "testing")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, "training in this folder")
    with pytest.raises(UserError, match="another process is training in this folder"):
        lock_folder(tmp_path, "training in this folder")
    os.close(first)
    os.close(lock_folder(tmp_path, "training in this folder"))


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError):
        lock_folder(tmp_path, "testing")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    os.close(lock_folder(tmp_path, "testing"))
