"""`hotshoe keys` and `hotshoe tenants`, on a state folder without a server and through one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.bases import BaseModel
from server.cli.admin import seconds_of
from tests.fixtures.adapters import write_adapter
from tests.fixtures.processes import Served


class Shell(Served):
    """The verbs without a server behind them: nothing is started."""

    def __init__(self, home: Path) -> None:
        self.home, self.url = home, ""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_without_a_server_keys_are_made_on_the_state_folder(home: Path) -> None:
    shell = Shell(home)
    flags = ("--home", str(home))
    made = shell.verb("keys", "create", "--scope", "infer, upload", "--tenant", "acme", "--expires", "30d", *flags)
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(r"hs-[0-9a-f]{48}", made.stdout.strip()) and "this once only" in made.stderr
    listed = shell.verb("keys", "ls", *flags)
    assert made.stdout.strip() not in listed.stdout and made.stdout[:11] in listed.stdout
    assert "acme  infer,upload  valid" in listed.stdout
    key_id = listed.stdout.split()[0]
    assert shell.verb("keys", "revoke", key_id, *flags).stdout == f"{key_id} is revoked\n"
    assert json.loads(shell.verb("keys", "ls", "--json", *flags).stdout)[0]["is_valid"] is False
    assert (home / "pepper").stat().st_mode & 0o077 == 0


def test_tenants_get_limits_and_share_on_the_state_folder(home: Path) -> None:
    shell = Shell(home)
    flags = ("--home", str(home))
    done = shell.verb("tenants", "set", "acme", "--versions", "20", "--requests-per-minute", "600", *flags)
    assert done.stdout == "acme  requests_per_minute=600 versions=20\n"
    kept = ("--file-bytes", "5", "--files", "2", "--upload-parts", "3", "--jobs", "4", "--running-jobs", "1")
    kept += ("--job-seconds", "60", "--job-bytes", "9", "--exports", "8", "--export-bytes", "7")
    assert (
        "file_bytes=5 files=2 upload_parts=3 jobs=4 running_jobs=1 job_seconds=60 job_bytes=9 exports=8 export_bytes=7"
        in shell.verb("tenants", "set", "acme", *kept, *flags).stdout
    )
    assert shell.verb("tenants", "set", "acme", "--versions", "3", *flags).stdout == "acme  versions=3\n"
    listed = shell.verb("tenants", "ls", *flags).stdout
    assert "acme  0 adapters  0 versions  0 bytes  0 files of 0 bytes  0 bytes of exports  versions=3" in listed
    refused = shell.verb("tenants", "share", "acme/router", "--with", "other", *flags)
    assert refused.returncode == 1 and "model_not_found" in refused.stderr
    assert "OWNER/NAME" in shell.verb("tenants", "share", "router", "--with", "other", *flags).stderr
    assert shell.verb("tenants", "usage", *flags).stdout == ""


@pytest.mark.parametrize("wrong", ["", "d", "0d", "1w", "-1d", "1.5h", "99999999d", "\u0663d"])
def test_a_life_that_cannot_be_read_is_refused(home: Path, wrong: str) -> None:
    done = Shell(home).verb("keys", "create", "--scope", "infer", "--expires", wrong, "--home", str(home))
    assert done.returncode == 1 and "write 90s, 15m, 12h or 30d" in done.stderr
    assert [seconds_of(text) for text in ("90s", "15m", "12h", "30d")] == [90, 900, 43_200, 2_592_000]


@pytest.fixture
def served(tiny_base: BaseModel, home: Path) -> Iterator[Served]:
    one = Served(home, "--engine", "scripted", "--base", str(tiny_base.folder))
    yield one
    one.end()


def test_through_a_server_keys_work_at_once_and_verbs_are_their_tenants(
    served: Served, home: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    held = served.verb("keys", "ls", "--home", str(home))
    assert held.returncode == 1 and "already_running" in held.stderr
    admin = {"HOTSHOE_API_KEY": served.verb("keys", "create", "--scope", "admin").stdout.strip()}
    assert served.verb("ls").returncode == 1, "the first key ended the time without keys"
    scopes = "infer,upload,promote,read"
    keys = {
        tenant: {
            "HOTSHOE_API_KEY": served.verb(
                "keys", "create", "--scope", scopes, "--tenant", tenant, **admin
            ).stdout.strip()
        }
        for tenant in ("acme", "other")
    }
    folder = write_adapter(tmp_path / "router", tiny_base, seed=41)
    assert served.verb("push", str(folder), "--name", "router", **keys["acme"]).returncode == 0
    assert "router" in served.verb("ls", **keys["acme"]).stdout
    assert "router" not in served.verb("ls", **keys["other"]).stdout
    share = ("share", "acme/router", "--with", "other")
    assert served.verb("tenants", *share, **admin).stdout == "other may ask acme/router\n"
    assert served.verb("tenants", "grants", "other", **admin).stdout == "acme/router  shared with other\n"
    asked = {"authorization": f"Bearer {keys['other']['HOTSHOE_API_KEY']}"}
    body = {"model": "acme/router", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=asked)
    assert answer.json()["model"] == "acme/router@1"
    assert served.verb("tenants", "unshare", *share[1:], **admin).returncode == 0
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=asked).status_code == 404
    used = served.verb("tenants", "usage", "--tenant", "*", **admin).stdout
    assert re.search(r"other  acme/router@1  1 requests  \d+ \+ \d+ tokens", used), used
    assert served.verb("keys", "create", "--scope", "infer", **keys["acme"]).returncode == 1, "not the operator's"
    served.end()
    log = served.err.read_text()
    assert "hs-" not in log and "tenant" in log
