"""A process leaves the machine's networks, where the kernel lets it: what trains on foreign data needs none.

https://man7.org/linux/man-pages/man2/unshare.2.html, https://man7.org/linux/man-pages/man7/user_namespaces.7.html
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000


def leave_networks() -> bool:
    """From now on this process and those that it starts have no network, not even loopback; False where it may not.

    Call it before the first thread. Without the right to a network of its own it takes a user namespace, in which it is
    who it was.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_NETWORK) == 0:
        return True
    if libc.unshare(NEW_USER | NEW_NETWORK) != 0:
        return False
    with suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny", "ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", "ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", "ascii")
    return True
