"""A process without a network, tried in one of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, socket, sys
from training.offline import leave_networks
left = leave_networks()
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5).close()
    reached = True
except OSError:
    reached = False
open("made", "w").write("it may write where it could before")
print(json.dumps([left, reached, os.getuid(), os.readlink("/proc/self/ns/net")]))
"""


@pytest.mark.parametrize("is_root", [True, False])
def test_a_process_that_has_left_reaches_not_even_loopback(tmp_path: Path, is_root: bool) -> None:
    if not is_root and os.getuid() != 0:
        pytest.skip("only root can become somebody without rights")
    if not is_root and any(not parent.stat().st_mode & 0o001 for parent in Path(sys.executable).resolve().parents):
        pytest.skip("the interpreter lies where nobody else may look")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(listener.getsockname()[1])],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]},
            user=None if is_root else 65534,
        )
    left, reached, user, network = json.loads(done.stdout)
    if not left:
        pytest.skip("the kernel gives no network namespace to a process here")
    assert not reached and network != str(Path("/proc/self/ns/net").readlink())
    assert user == (os.getuid() if is_root else 65534) and (tmp_path / "made").exists()
