"""The engine's private folder: socket and log, for our user only."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import ConfigInvalid

SOCKET_PATH_LIMIT_BYTES = 107  # of sun_path on Linux, without its final NUL


def prepare_run_dir(run_dir: Path) -> Path:
    """Make the folder with mode 0700 and no left-over socket in it; returns the socket's path. Raises ConfigInvalid."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir.chmod(0o700)
    socket_path = check_socket_path(run_dir)
    socket_path.unlink(missing_ok=True)
    return socket_path


def check_socket_path(run_dir: Path) -> Path:
    socket_path = run_dir.absolute() / "engine.sock"
    length = len(str(socket_path).encode())
    if length > SOCKET_PATH_LIMIT_BYTES:
        raise ConfigInvalid(
            f"The engine's socket {socket_path} has a path of {length} bytes; Linux allows {SOCKET_PATH_LIMIT_BYTES}. "
            "Choose a folder with a shorter path.",
            param="run_dir",
        )
    return socket_path
