"""HTTPS by a real `hotshoe serve`, with certificates of the test's own authority."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from bench.served import free_port
from server.tls import Certificate
from tests.fixtures.certificates import Authority
from tests.fixtures.processes import Served
from tests.fixtures.service import eventually

KEY = "a-key-of-the-tls"


class Secure(Served):
    """The process speaks HTTPS; it is ready when a client that trusts the authority says so."""

    def __init__(self, home: Path, base: BaseModel, authority: Authority, cert: Path, key: Path) -> None:
        self.trust = ssl.create_default_context(cafile=str(authority.file))
        flags = ("--engine", "scripted", "--base", str(base.folder), "--tls-cert", str(cert), "--tls-key", str(key))
        super().__init__(home, *flags, HOTSHOE_API_KEY=KEY)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.err.read_text()[-4000:]
        self.url = f"https://127.0.0.1:{self.port}"
        return httpx.get(f"{self.url}/ready", verify=self.trust).status_code == 200

    def shown_certificate(self) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as one,
        ):
            return one.getpeercert(binary_form=True) or b""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secure(authority: Authority, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    one = Secure(tmp_path_factory.mktemp("tls") / "home", tiny_base, authority, *authority.issue("first"))
    yield one
    one.end()


def test_openais_client_speaks_https_when_it_trusts_the_authority(secure: Secure) -> None:
    assert f"hotshoe serves tiny on https://127.0.0.1:{secure.port}/v1" in secure.out.read_text()
    with openai.OpenAI(
        base_url=f"{secure.url}/v1", api_key=KEY, http_client=httpx.Client(verify=secure.trust), max_retries=0
    ) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "tiny heard: hello"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secure.url}/health", verify=ssl.create_default_context())


def test_plain_http_on_that_port_is_an_error_and_costs_nobody_else(secure: Secure) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{secure.port}/health", timeout=10)
    assert httpx.get(f"{secure.url}/health", verify=secure.trust).status_code == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "is_spoken"), [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)]
)
def test_nothing_below_tls_1_2_is_spoken(secure: Secure, version: str, is_spoken: bool) -> None:
    assert speaks(secure, ssl.TLSVersion[version]) is is_spoken


def speaks(secure: Secure, version: ssl.TLSVersion) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # this OpenSSL would not even offer the old versions otherwise
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", secure.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain) as one:
                return one.version() == version.name.replace("TLSv1_", "TLSv1.")
        except (ssl.SSLError, ConnectionError):
            return False


def test_a_renewed_certificate_is_shown_after_a_hangup_and_running_streams_go_on(
    secure: Secure, authority: Authority
) -> None:
    before = secure.shown_certificate()
    cert, key = authority.issue("second")
    with httpx.Client(base_url=secure.url, verify=secure.trust) as kept:
        assert kept.get("/health").status_code == 200
        key.replace(authority.folder / "first.key")
        secure.process.send_signal(signal.SIGHUP)  # between the two files: what does not fit leaves the old pair
        eventually(lambda: "the certificate stays the old one" in secure.err.read_text())
        assert secure.shown_certificate() == before
        cert.replace(authority.folder / "first.pem")
        secure.process.send_signal(signal.SIGHUP)
        eventually(lambda: secure.shown_certificate() != before)
        assert kept.get("/health").status_code == 200


def _missing(authority: Authority) -> tuple[Path, Path]:
    return authority.folder / "nowhere.pem", authority.issue("kept")[1]


def _folder(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("kept")[0], authority.folder


def _mismatched(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("one")[0], authority.issue("other")[1]


def _encrypted(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("locked", password=b"secret")


def _swapped(authority: Authority) -> tuple[Path, Path]:
    cert, key = authority.issue("swapped")
    return key, cert


def _garbage(authority: Authority) -> tuple[Path, Path]:
    cert, key = authority.issue("garbage")
    cert.write_bytes(b"not a certificate")
    return cert, key


def _empty(authority: Authority) -> tuple[Path, Path]:
    cert, key = authority.issue("empty")
    key.write_bytes(b"")
    return cert, key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "tls_cert .*nowhere.pem is no file that can be read"),
        (_folder, "tls_key .* is no file that can be read"),
        (_mismatched, "other.key is not the key of tls_cert .*one.pem"),
        (_encrypted, "is encrypted.*openssl pkey"),
        (_swapped, "cannot be used"),
        (_garbage, "cannot be used"),
        (_empty, "cannot be used"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_what_to_do(
    make: Callable[[Authority], tuple[Path, Path]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        Certificate(*make(Authority(tmp_path)))


def test_the_server_says_so_before_it_touches_its_state(secure: Secure, authority: Authority, tmp_path: Path) -> None:
    cert, key = _encrypted(authority)
    home = tmp_path / "never"
    words = (
        "serve",
        "--engine",
        "scripted",
        "--port",
        str(free_port()),
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
    )
    refused = secure.run(*words, HOTSHOE_HOME=str(home))
    assert refused.returncode == 1 and "config_invalid: tls_key" in refused.stderr and "Traceback" not in refused.stderr
    assert not home.exists()


def test_the_least_version_is_said_and_not_left_to_the_machines_openssl(authority: Authority) -> None:
    assert Certificate(*authority.issue("least")).context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_key_that_others_may_read_is_warned_of(authority: Authority, capfd: pytest.CaptureFixture[str]) -> None:
    cert, key = authority.issue("open")
    Certificate(cert, key)
    assert "can be read by every account" not in "".join(capfd.readouterr())
    key.chmod(0o644)
    Certificate(cert, key)
    assert "can be read by every account" in "".join(capfd.readouterr())
