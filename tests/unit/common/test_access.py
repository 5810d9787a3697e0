"""Callers: keys, certificates, rights, and the file that names them."""

import hashlib
from pathlib import Path

import pytest

from services.common.access import ANYBODY, Access, Caller, Right
from services.common.config import ConfigError
from services.common.errors import PermissionDenied, Unauthenticated


def digest(key: str) -> str:
    """Return what the file holds for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def access(tmp_path: Path, text: str) -> Access:
    """Read a file."""
    file = tmp_path / "callers.yaml"
    file.write_text(text)
    return Access(str(file))


def test_keys_and_certificates_name_their_caller(tmp_path: Path) -> None:
    """Every key of a caller works, only with the Bearer scheme; a certificate counts where no key is shown."""
    known = access(
        tmp_path,
        f"team-a: [{digest('one')}, {digest('two')}]\n"
        f"team-b: {{keys: ['{digest('three')}'], certificates: [b.example]}}\n"
        f"gateway: {{certificates: [gateway], rights: [act-for-tenants, monitor]}}\n",
    )
    assert [known.identify(f"Bearer {key}").name for key in ("one", "two", "three")] == ["team-a", "team-a", "team-b"]
    assert known.identify("", ["localhost", "b.example"]).name == "team-b"
    assert known.identify("bearer one", ["b.example"]).name == "team-a"
    assert known.identify("", ["gateway"]).rights == {Right.ACT_FOR_TENANTS, Right.MONITOR}
    for authorization in ("", "Bearer", "Bearer four", "Basic one", "one", f"Bearer {digest('one')}", "Bearer " * 999):
        with pytest.raises(Unauthenticated):
            known.identify(authorization, ["localhost"])
    with pytest.raises(Unauthenticated):  # a wrong key is not made good by a certificate
        known.identify("Bearer four", ["gateway"])


def test_without_a_file_everybody_may_do_everything() -> None:
    """Nobody is asked."""
    assert Access().identify("Bearer whatever") is ANYBODY
    assert ANYBODY.tenant("claimed") == "claimed"
    assert ANYBODY.may(Right.ADMIN)


def test_tenants_are_the_callers_own() -> None:
    """Only a gateway names tenants; a tenant sees its own requests, a gateway those of the tenant it asks for."""
    tenant, gateway = Caller("a"), Caller("gateway", frozenset({Right.ACT_FOR_TENANTS}))
    admin = Caller("ops", frozenset({Right.ADMIN}))
    assert (tenant.tenant(""), tenant.tenant("a"), gateway.tenant("b"), gateway.tenant("")) == ("a", "a", "b", "")
    with pytest.raises(PermissionDenied):
        tenant.tenant("b")
    seen = {
        (who.name, owner, claimed)
        for who in (tenant, gateway, admin)
        for owner in ("a", "b", "")
        for claimed in ("", "a")
        if who.may_see(owner, claimed)
    }
    assert seen == {
        ("a", "a", ""), ("a", "a", "a"),
        ("gateway", "", ""), ("gateway", "a", "a"),
        ("ops", "a", ""), ("ops", "b", ""), ("ops", "", ""), ("ops", "a", "a"),
    }  # fmt: skip
    assert not tenant.may(Right.ADMIN, Right.MONITOR, Right.REGISTER)
    assert admin.may(Right.REGISTER)


def test_changes_of_the_file_take_effect(tmp_path: Path) -> None:
    """A key that was added works, one that was removed does not; a file with mistakes changes nothing."""
    known = access(tmp_path, f"team-a: [{digest('old')}]\n")
    access(tmp_path, f"team-a: [{digest('new')}, {digest('newer')}]\n")
    assert known.identify("Bearer new").name == "team-a"
    with pytest.raises(Unauthenticated):
        known.identify("Bearer old")
    (tmp_path / "callers.yaml").write_text("team-a: [")
    assert known.identify("Bearer newer").name == "team-a"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "team-a: secret",
        "team-a: [secret]",
        "team-a: [abcd]",
        "team-a: [1]",
        "team-a: []",
        "{",
        f"1: [{digest('one')}]",
        f"team-a: {{keys: [{digest('one')}], rights: [everything]}}",
        f"team-a: {{keys: [{digest('one')}], right: [admin]}}",
        f"team-a: [{digest('one')}]\nteam-b: [{digest('one')}]",
        "team-a: {rights: [admin]}",
        "team-a: {certificates: gateway}",
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str) -> None:
    """A file without callers would let nobody in, plaintext keys do not belong there, and typing errors show."""
    with pytest.raises(ConfigError):
        access(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A typing error must not open the door."""
    with pytest.raises(ConfigError):
        Access(str(tmp_path / "none.yaml"))
