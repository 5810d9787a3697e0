"""API keys: who a request is from. The file holds hashes only."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.common.config import ConfigError
from services.gateway.problems import ApiError

_HEX_DIGITS = 64


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """SHA-256 digests of the accepted keys with the tenant of each; empty: everybody is let in."""

    tenants: tuple[tuple[bytes, str], ...] = ()

    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """Return the tenant of a request, "" when no keys are asked for. Raises ApiError (401)."""
        if not self.tenants:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = ""
        for digest, tenant in self.tenants:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, given):
                found = tenant
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401,
                "a valid API key is required: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found


def load_api_keys(file: str) -> ApiKeys:
    """Read the keys of a YAML file `{tenant: [sha256, ...]}`; no file, no keys. Raises ConfigError."""
    if not file:
        return ApiKeys()
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file}: expected a mapping of tenants to lists of SHA-256 digests")
    return ApiKeys(
        tuple((digest, str(tenant)) for tenant, keys in content.items() for digest in _digests(file, tenant, keys))
    )


def _digests(file: str, tenant: object, keys: Any) -> list[bytes]:
    if not tenant or not isinstance(keys, list):
        raise ConfigError(f"{file}: {tenant}: expected a list of SHA-256 digests")
    digests = []
    for key in keys:
        try:
            digest = bytes.fromhex(key) if isinstance(key, str) else b""
        except ValueError:
            digest = b""
        if len(digest) * 2 != _HEX_DIGITS:
            raise ConfigError(
                f"{file}: {tenant}: a digest must be {_HEX_DIGITS} hexadecimal digits (sha256sum of the key)"
            )
        digests.append(digest)
    return digests
