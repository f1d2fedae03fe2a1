"""HTTPS: certificate and key checked before anything dear starts, and read again while the server runs."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import structlog

from adapters.errors import ConfigInvalid

READABLE_BY_OTHERS = 0o004

log = structlog.get_logger("hotshoe.tls")


class Certificate:
    """A server's certificate chain and private key in their files, and the context that new connections use."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises ConfigInvalid for files that cannot be used together."""
        self.cert, self.key = cert, key
        self.context = _empty_context()
        self._load_into(self.context)

    def reload(self) -> None:
        """Let new connections use the files as they are now; raises ConfigInvalid and keeps the old ones."""
        self._load_into(_empty_context())  # a pair that does not fit would leave the live context with half of it
        self._load_into(self.context)

    def renew(self) -> None:
        """The same, for a signal: it is logged how it went."""
        try:
            self.reload()
        except ConfigInvalid as error:
            log.error("the certificate stays the old one", reason=error.message)
        else:
            log.info("the certificate was read again", path=str(self.cert))

    def _load_into(self, context: ssl.SSLContext) -> None:
        for name, path in (("tls_cert", self.cert), ("tls_key", self.key)):
            if not path.is_file() or not os.access(path, os.R_OK):
                raise ConfigInvalid(f"{name} {path} is no file that can be read: give its path, as PEM.", param=name)
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except _Encrypted:
            raise ConfigInvalid(
                f"tls_key {self.key} is encrypted: a server that starts by itself has nobody to ask for the password. "
                f"Write it without one, in a file that only the server may read: openssl pkey -in {self.key} -out KEY.",
                param="tls_key",
            ) from None
        except ssl.SSLError as error:
            raise self._refused(error) from None
        if self.key.stat().st_mode & READABLE_BY_OTHERS:
            log.warning("the private key can be read by every account of this machine", path=str(self.key))

    def _refused(self, error: ssl.SSLError) -> ConfigInvalid:
        if error.reason == "KEY_VALUES_MISMATCH":
            return ConfigInvalid(
                f"tls_key {self.key} is not the key of tls_cert {self.cert}: give the pair, the server's own "
                "certificate first in its file.",
                param="tls_key",
            )
        return ConfigInvalid(
            f"tls_cert {self.cert} and tls_key {self.key} cannot be used ({error.reason or error}): both are PEM "
            "files, the certificate's with its chain behind it.",
            param="tls_cert",
        )


class _Encrypted(Exception):
    """OpenSSL asks for a password."""


def _no_password() -> str:
    raise _Encrypted


def _empty_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
