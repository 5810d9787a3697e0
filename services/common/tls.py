"""TLS of a service: one block of options for what it listens on and what it connects to; files may be replaced."""

import ipaddress
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc

from ascendra.tls import Stamp, Tls, file_stamp
from services.common.config import option
from services.common.listening import host_and_port
from services.common.logging import get_logger

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Certificates in PEM files, which may be replaced while the service runs."""

    cert: str = option("", "certificate chain that the service shows, to clients and to servers; empty: plaintext port")
    key: str = option("", "private key of the certificate")
    ca: str = option("", "authorities whose certificates are accepted; also: connect to others with TLS")
    client_auth: Literal["required", "none"] = option("required", "whether clients must show a certificate of `ca`")
    client_names: tuple[str, ...] = option((), "names of which a client's certificate must carry one; empty: any")
    server_name: str = option("", "name that certificates of servers must carry; empty: the host in their address")

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ValueError("tls: cert and key belong together")
        if self.cert and self.client_auth == "required" and not self.ca:
            raise ValueError("tls: client-auth required needs the authorities of the clients in ca")
        if self.client_names and not (self.cert and self.client_auth == "required"):
            raise ValueError("tls: client-names needs cert, key and client-auth required")

    @property
    def serves(self) -> bool:
        """Whether what the service listens on is encrypted."""
        return bool(self.cert)

    def as_client(self) -> Tls | None:
        """Return how to connect to others; None: in plaintext."""
        if not self.ca:
            return None
        return Tls(ca=self.ca, cert=self.cert, key=self.key, server_name=self.server_name)


PLAINTEXT = TlsConfig()
"""No certificates."""


def check_listener(listen: str, tls: TlsConfig, insecure: bool) -> None:
    """Raise ValueError for a plaintext listener that other machines can reach, unless that is explicitly wanted.

    Also for what is neither host:port nor unix:PATH.
    """
    if not listen.startswith("unix:"):
        try:
            host_and_port(listen)
        except ValueError as error:
            raise ValueError(f"listen: {error}; or unix:PATH") from error
    if not (tls.serves or insecure or is_local(listen)):
        raise ValueError(
            f"listen: {listen} can be reached from other machines in plaintext; set tls (cert, key, ca), "
            "or insecure to true where the network itself protects it"
        )


def is_local(address: str) -> bool:
    """Return whether an address, host:port or unix:PATH, can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class CertificateFiles:
    """The files of a server: what was good last stays in use while the files are unreadable or do not fit."""

    def __init__(self, cert: str, key: str, ca: str = "") -> None:
        """Read the files. Raises ValueError when they cannot be used."""
        self._cert, self._key, self._ca = cert, key, ca
        self._lock = threading.Lock()
        self._stamp: Stamp = ()
        self._complained: Stamp = ()
        try:
            self._check()
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(f"tls: {_first_missing(cert, key, ca) or cert}: {error.strerror or error}") from error
        self._stamp = file_stamp(cert, key, ca)

    def changed(self) -> bool:
        """Return, once for each change, whether there are new files and they fit together. Safe in any thread."""
        with self._lock:
            stamp = file_stamp(self._cert, self._key, self._ca)
            if stamp == self._stamp:
                return False
            try:
                self._check()
            except OSError as error:
                if stamp != self._complained:
                    log.error("certificates_refused", cert=self._cert, why=str(error))
                self._complained = stamp
                return False
            self._stamp = stamp
            log.info("certificates_reloaded", cert=self._cert)
            return True

    def context(self) -> ssl.SSLContext:
        """Return a context for HTTPS with the present certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._cert, self._key)
        return context

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        """Return the present files for gRPC."""
        chain = (Path(self._key).read_bytes(), Path(self._cert).read_bytes())
        return grpc.ssl_server_certificate_configuration([chain], Path(self._ca).read_bytes() if self._ca else None)

    def _check(self) -> None:
        context = self.context()
        if self._ca:
            context.load_verify_locations(self._ca)


def grpc_server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Return credentials that look at the files at every handshake. Raises ValueError."""
    required = tls.client_auth == "required"
    files = CertificateFiles(tls.cert, tls.key, tls.ca if required else "")

    def newer() -> grpc.ServerCertificateConfiguration | None:
        return files.for_grpc() if files.changed() else None

    return grpc.dynamic_ssl_server_credentials(
        files.for_grpc(),
        newer,  # type: ignore[arg-type]  # the stubs do not know that None means "as before"
        require_client_authentication=required,
    )


def https_context(cert: str, key: str) -> ssl.SSLContext:
    """Return a context that looks at the files at every handshake. Raises ValueError."""
    files = CertificateFiles(cert, key)
    current = context = files.context()

    def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal current
        if files.changed():
            current = files.context()
        if current is not context:
            connection.context = current

    context.sni_callback = choose
    return context


def peer_names(context: Any) -> tuple[str, ...]:
    """Return the names in the certificate that the caller of a gRPC call has shown; its common name if it has none."""
    auth = context.auth_context()
    found = auth.get("x509_subject_alternative_name") or auth.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "replace") for name in found)


def _first_missing(*files: str) -> str:
    return next((file for file in files if file and not Path(file).is_file()), "")
