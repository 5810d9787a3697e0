"""`ascendra certs`: a certificate authority for development and certificates of all services."""

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ascendra.cli.options import CliError, Commands

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

NAMES = ("router", "worker", "predictor", "gateway", "sink", "client")
_CA_DAYS = 3650


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    certs = commands.add_parser(
        "certs",
        help="make certificates for development",
        description="Make an authority, once, and a certificate NAME.crt with key NAME.key for every name. "
        "For production use your own authority: cert-manager, Vault, SPIFFE.",
    )
    certs.add_argument("--out", type=Path, metavar="DIR", default=Path("certs"), help="folder (default: %(default)s)")
    certs.add_argument(
        "--name", action="append", metavar="NAME", help=f"certificate to make; repeatable (default: {', '.join(NAMES)})"
    )
    certs.add_argument(
        "--host",
        action="append",
        metavar="HOST",
        default=[],
        help="further DNS name or address in every certificate, beside its NAME, localhost and the loopback addresses",
    )
    certs.add_argument(
        "--folders",
        action="store_true",
        help="put every certificate into a folder of its NAME, with a copy of ca.crt: what a container may see",
    )
    certs.add_argument("--days", type=float, metavar="D", default=90.0, help="validity in days (default: %(default)s)")
    certs.set_defaults(run=run_certs)


def run_certs(arguments: argparse.Namespace) -> int:
    """Make the certificates. Raises CliError."""
    try:
        valid_for = timedelta(days=arguments.days)
    except (OverflowError, ValueError) as error:
        raise CliError(f"--days: {error}", exit_status=2) from error
    try:
        authority = Authority.load_or_make(arguments.out)
        for name in arguments.name or NAMES:
            folder = authority.folder_of(name) if arguments.folders else None
            authority.issue(name, folder, hosts=arguments.host, valid_for=valid_for)
    except ImportError as error:
        raise CliError("this command needs the cryptography package", hint="pip install cryptography") from error
    except OverflowError as error:  # a date beyond the calendar's last
        raise CliError(f"--days: {error}", exit_status=2) from error
    except (OSError, ValueError) as error:
        raise CliError(str(error)) from error
    print(f"{arguments.out}/: ca.crt and certificates for {', '.join(arguments.name or NAMES)}")
    print(f"keep {arguments.out}/ca.key to yourself: who has it can be anybody")
    return 0


@dataclass(frozen=True)
class Authority:
    """A certificate authority and the folder of its certificates."""

    folder: Path
    certificate: "x509.Certificate"
    key: "ec.EllipticCurvePrivateKey"

    @classmethod
    def load_or_make(cls, folder: Path) -> "Authority":
        """Return the authority of a folder, made when there is none. Raises OSError, ValueError or ImportError."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
        if certificate_file.exists():
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key_file} is not the key of an authority that this command made")
            return cls(folder, x509.load_pem_x509_certificate(certificate_file.read_bytes()), key)
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Ascendra development authority")])
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        certificate = (
            _builder(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        _write_pair(folder, "ca", certificate, key)
        return cls(folder, certificate, key)

    def folder_of(self, name: str) -> Path:
        """Return the folder of one name, made when there is none, with a copy of the authority's certificate."""
        from cryptography.hazmat.primitives import serialization

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # a container's user is another one
        _replace(folder / "ca.crt", self.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return folder

    def issue(
        self,
        name: str,
        folder: Path | None = None,
        *,
        hosts: Sequence[str] = (),
        valid_for: timedelta = timedelta(days=90),
    ) -> None:
        """Write NAME.crt and NAME.key for server and client use.

        Args:
            folder: where to; None: beside the authority.
            hosts: names and addresses beside NAME and those of this machine.
            valid_for: a negative one makes an expired certificate.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        names = dict.fromkeys((name, "localhost", "127.0.0.1", "::1", *hosts))
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), datetime.now(UTC) + valid_for)
            .add_extension(x509.SubjectAlternativeName([_general_name(one) for one in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        _write_pair(folder or self.folder, name, certificate, key)


def _builder(
    subject: "x509.Name", issuer: "x509.Name", public_key: "ec.EllipticCurvePublicKey", until: datetime
) -> "x509.CertificateBuilder":
    from cryptography import x509

    since = min(datetime.now(UTC), until) - timedelta(hours=1)  # clocks differ
    return x509.CertificateBuilder(
        issuer, subject, public_key, x509.random_serial_number(), not_valid_before=since, not_valid_after=until
    )


def _general_name(name: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_pair(folder: Path, name: str, certificate: "x509.Certificate", key: "ec.EllipticCurvePrivateKey") -> None:
    from cryptography.hazmat.primitives import serialization

    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _replace(folder / f"{name}.key", pem, 0o600)
    _replace(folder / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _replace(file: Path, content: bytes, mode: int) -> None:
    """Write a file so that its readers see the old content or the new one."""
    beside = file.with_name(f".{file.name}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.fchmod(descriptor, mode)  # whatever the umask: others read certificates, nobody else a key
    with open(descriptor, "wb") as writer:
        writer.write(content)
    beside.replace(file)
