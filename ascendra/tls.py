"""Certificates of a client, in PEM files: whom it trusts and what it shows."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from ascendra.errors import InvalidArgumentError

Stamp = tuple[tuple[int, int, int], ...]
"""Changes when a file is replaced or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encrypts connections. The files are read again when a connection is made after they changed."""

    ca: str = ""
    """File with the authorities that may have signed a server's certificate; empty: those gRPC comes with."""
    cert: str = ""
    """File with the certificate chain to show; empty: none."""
    key: str = ""
    """File with its private key."""
    server_name: str = ""
    """Name that servers' certificates must carry; empty: the host in the address."""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise InvalidArgumentError("tls: cert and key belong together")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises InvalidArgumentError when one cannot be read."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def options(self) -> list[tuple[str, str]]:
        """Return the channel options."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def stamp(self) -> Stamp:
        """Return what changes when the files change."""
        return file_stamp(self.ca, self.cert, self.key)


def file_stamp(*files: str) -> Stamp:
    """Return what changes when one of the files is replaced or written; files that are missing count as such."""
    stamps = []
    for file in filter(None, files):
        try:
            status = Path(file).stat()
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            stamps.append((0, 0, 0))
    return tuple(stamps)


def _read(file: str) -> bytes | None:
    try:
        return Path(file).read_bytes() if file else None
    except OSError as error:
        raise InvalidArgumentError(f"tls: cannot read {file}: {error.strerror}") from error
