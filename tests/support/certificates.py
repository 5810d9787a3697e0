"""Certificates for tests: a trusted authority, another one, and what they have signed."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from ascendra import Tls
from ascendra.cli.certs import Authority


class Certificates:
    """A folder with `ca.crt` and certificates by name, and beside it one of an authority that nobody trusts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trusted"
        self.authority = Authority.load_or_make(self.folder)
        self._other = folder / "other"

    def issue(self, name: str, *, valid_for: timedelta = timedelta(days=1)) -> None:
        """Make, or make again, the certificate of a name."""
        self.authority.issue(name, valid_for=valid_for)

    def block(self, name: str, **more: Any) -> dict[str, Any]:
        """Return a service's `tls` block."""
        return {"cert": self.file(f"{name}.crt"), "key": self.file(f"{name}.key"), "ca": self.file("ca.crt"), **more}

    def client(self, name: str = "", server_name: str = "") -> Tls:
        """Return a client that trusts the authority and shows the certificate of a name, if any."""
        shown = {"cert": self.file(f"{name}.crt"), "key": self.file(f"{name}.key")} if name else {}
        return Tls(ca=self.file("ca.crt"), server_name=server_name, **shown)

    def stranger(self, name: str) -> Tls:
        """Return a client that trusts the authority and shows a certificate of another one for the same name."""
        Authority.load_or_make(self._other).issue(name)
        other = self._other / name
        return Tls(ca=self.file("ca.crt"), cert=f"{other}.crt", key=f"{other}.key")

    def mistrustful(self, name: str) -> Tls:
        """Return a client that trusts only the other authority."""
        Authority.load_or_make(self._other)
        return Tls(ca=str(self._other / "ca.crt"), cert=self.file(f"{name}.crt"), key=self.file(f"{name}.key"))

    def write(self, name: str, text: str) -> None:
        """Put something else into a file."""
        (self.folder / name).write_text(text)

    def file(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)
