"""API keys."""

import hashlib
from pathlib import Path

import pytest

from services.common.config import ConfigError
from services.gateway.api_keys import ApiKeys, load_api_keys
from services.gateway.problems import ApiError


def digest(key: str) -> str:
    """Return what the file holds for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_name_their_tenant(tmp_path: Path) -> None:
    """Every key of a tenant works, and only with the Bearer scheme."""
    file = tmp_path / "keys.yaml"
    file.write_text(f"team-a: [{digest('one')}, {digest('two')}]\nteam-b: ['{digest('three')}']\n")
    keys = load_api_keys(str(file))
    tenants = [keys.tenant_of({"authorization": f"Bearer {key}"}) for key in ("one", "two", "three")]
    assert tenants == ["team-a", "team-a", "team-b"]
    for authorization in ("", "Bearer", "Bearer four", "Basic one", "one", f"Bearer {digest('one')}"):
        with pytest.raises(ApiError) as raised:
            keys.tenant_of({"authorization": authorization})
        assert raised.value.status == 401


def test_without_a_file_everybody_is_let_in() -> None:
    """No key is asked for."""
    assert load_api_keys("") == ApiKeys()
    assert ApiKeys().tenant_of({}) == ""


@pytest.mark.parametrize(
    "content", ["", "[]", "team-a: secret", "team-a: [secret]", "team-a: [abcd]", "team-a: [1]", "{"]
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str) -> None:
    """A file without keys would let nobody in, and plaintext keys do not belong there."""
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError):
        load_api_keys(str(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A typing error must not open the gateway."""
    with pytest.raises(ConfigError):
        load_api_keys(str(tmp_path / "none.yaml"))
