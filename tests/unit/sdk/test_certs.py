"""`ascendra certs`."""

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from ascendra.cli import main
from ascendra.cli.certs import NAMES


def names_of(file: Path) -> set[str]:
    """Return the names in a certificate."""
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def test_every_service_gets_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each verifies under the authority, carries its names, and its key is for its owner's eyes only."""
    out = tmp_path / "certs"
    assert main(["certs", "--out", str(out), "--host", "ten.example", "--host", "10.0.0.1", "--days", "2"]) == 0
    assert "ca.key" in capsys.readouterr().out
    for name in NAMES:
        certificate, key = out / f"{name}.crt", out / f"{name}.key"
        assert key.stat().st_mode & 0o777 == 0o600
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        assert names_of(certificate) == {name, "localhost", "127.0.0.1", "::1", "ten.example", "10.0.0.1"}
        leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate((out / "ca.crt").read_bytes()))
        assert abs(leaf.not_valid_after_utc - datetime.now(UTC) - timedelta(days=2)) < timedelta(hours=1)


def test_an_authority_is_made_once(tmp_path: Path) -> None:
    """A second call adds a certificate of the same authority and leaves the others alone."""
    assert main(["certs", "--out", str(tmp_path), "--name", "router"]) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["certs", "--out", str(tmp_path), "--name", "extra"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {*before, "extra.crt", "extra.key"}
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_folders_are_for_containers(tmp_path: Path) -> None:
    """A folder of one name holds what that container may see, whatever the umask, and stays when files are replaced."""
    umask = os.umask(0o077)
    try:
        arguments = ["certs", "--out", str(tmp_path), "--folders", "--name", "router", "--name", "client"]
        assert main(arguments) == 0
        folder = tmp_path / "router"
        before, old = folder.stat().st_ino, (folder / "router.key").read_bytes()
        assert main(arguments) == 0
    finally:
        os.umask(umask)
    assert folder.stat().st_ino == before
    assert (folder / "router.key").read_bytes() != old
    modes = {file.name: file.stat().st_mode & 0o777 for file in (folder, *folder.iterdir())}
    assert modes == {"router": 0o755, "ca.crt": 0o644, "router.crt": 0o644, "router.key": 0o600}
    assert (folder / "ca.crt").read_bytes() == (tmp_path / "ca.crt").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"ca.crt", "ca.key", "router", "client"}
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "router.crt", folder / "router.key")


def test_a_broken_authority_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not replaced: certificates that exist would no longer fit."""
    (tmp_path / "ca.crt").write_text("no certificate")
    (tmp_path / "ca.key").write_text("no key")
    assert main(["certs", "--out", str(tmp_path)]) == 1
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("days", ["nan", "1e9", "1e7", "inf"])
def test_a_validity_beyond_the_calendar_is_refused(
    days: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that names it."""
    assert main(["certs", "--out", str(tmp_path), "--days", days]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --days: ")
