"""Who calls, by API key or certificate, and what that caller may do. The file holds hashes of keys only."""

import contextvars
import enum
import hashlib
import hmac
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ascendra.tls import file_stamp
from services.common.config import ConfigError
from services.common.errors import PermissionDenied, Unauthenticated
from services.common.logging import get_logger
from services.common.tls import TlsConfig, peer_names

log = get_logger()

_HEX_DIGITS = 64
_MAX_KEY_BYTES = 4096

Authorize = Callable[[str, Any], None]
"""(full method name, servicer context): raises ServiceError unless the caller may call the method."""


class Right(enum.StrEnum):
    """What a caller may do."""

    GENERATE = "generate"
    """Have requests served in its own name, and ask about them."""
    ACT_FOR_TENANTS = "act-for-tenants"
    """Have requests served in the name of the tenant that each of them states."""
    REGISTER = "register"
    """Announce a worker."""
    MONITOR = "monitor"
    """See the status of the cluster and metrics."""
    ADMIN = "admin"
    """Everything, also changing roles, draining workers and asking about anybody's requests."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may do something."""

    name: str
    rights: frozenset[Right] = frozenset({Right.GENERATE})

    def may(self, *rights: Right) -> bool:
        """Return whether the caller has one of the rights."""
        return Right.ADMIN in self.rights or not self.rights.isdisjoint(rights)

    def tenant(self, claimed: str) -> str:
        """Return the tenant that a request of this caller is served for. Raises PermissionDenied."""
        if self.may(Right.ACT_FOR_TENANTS):
            return claimed
        if claimed not in ("", self.name):
            raise PermissionDenied("tenant: a request is served for its caller only", reason="OTHER_TENANT")
        return self.name

    def may_see(self, tenant: str, claimed: str) -> bool:
        """Return whether a tenant's requests may be shown, asked for in the name of the tenant `claimed`."""
        if Right.ADMIN in self.rights:
            return claimed in ("", tenant)
        return tenant == self.tenant(claimed)


ANYBODY = Caller("", frozenset(Right))
"""The caller where nobody is asked who it is."""
_CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return who made the gRPC call that is being served."""
    return _CALLER.get()


@dataclass(frozen=True, slots=True)
class _Callers:
    """The content of a file."""

    keys: tuple[tuple[bytes, Caller], ...] = ()
    """SHA-256 of the key."""
    certificates: Mapping[str, Caller] | None = None


class Access:
    """The known callers. The file is read again when it changes; a wrong one leaves the last good one in force."""

    def __init__(self, file: str = "") -> None:
        """Read a file; without one everybody may do everything. Raises ConfigError."""
        self._file = file
        self._lock = threading.Lock()
        self._stamp = file_stamp(file)
        self._callers = _read(file) if file else _Callers()

    @property
    def open(self) -> bool:
        """Whether nobody is asked who it is."""
        return not self._file

    def identify(self, authorization: str, certificate_names: Iterable[str] = ()) -> Caller:
        """Return who shows this authorization header (Bearer KEY) or, without one, a certificate for these names.

        Raises Unauthenticated.
        """
        if self.open:
            return ANYBODY
        callers = self._current()
        if authorization:
            found = _by_key(callers, authorization)
        else:
            known = callers.certificates or {}
            found = next((known[name] for name in certificate_names if name in known), None)
        if found is None:
            raise Unauthenticated("a valid API key is required: authorization: Bearer KEY", reason="INVALID_API_KEY")
        return found

    def _current(self) -> _Callers:
        stamp = file_stamp(self._file)
        if stamp != self._stamp:
            with self._lock:
                self._stamp = stamp
                try:
                    self._callers = _read(self._file)
                    log.info("callers_reloaded", file=self._file)
                except ConfigError as error:
                    log.error("callers_refused", why=str(error))
        return self._callers


def _by_key(callers: _Callers, authorization: str) -> Caller | None:
    scheme, _, key = authorization.partition(" ")
    given = hashlib.sha256(key.strip()[:_MAX_KEY_BYTES].encode()).digest()
    found = None
    for digest, caller in callers.keys:  # all of them, so that the time tells nothing
        if hmac.compare_digest(digest, given):
            found = caller
    return found if scheme.lower() == "bearer" else None


def authorizer(access: Access, rights: Mapping[str, tuple[Right, ...]]) -> Authorize | None:
    """Return what lets callers do what they may; None where everybody may do everything.

    Args:
        rights: by full name of a method or, ending in "/", of a service: of which rights one is needed. What is not
            listed needs ADMIN.
    """
    if access.open:
        return None

    def authorize(method: str, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        caller = access.identify(str(metadata.get("authorization", "")), peer_names(context))
        service = method[: method.rindex("/") + 1]
        if not caller.may(*rights.get(method, rights.get(service, ()))):
            raise PermissionDenied(f"{caller.name} may not call {method}")
        _CALLER.set(caller)

    return authorize


def named_peers(tls: TlsConfig) -> Authorize | None:
    """Return what lets in only clients whose certificate carries a name that the configuration lists, if it does."""
    allowed = frozenset(tls.client_names)
    if not allowed:
        return None

    def authorize(_method: str, context: Any) -> None:
        names = peer_names(context)
        if allowed.isdisjoint(names):
            shown = ", ".join(names)[:200] or "nobody"
            raise PermissionDenied(f"the client's certificate is for {shown}", reason="WRONG_CERTIFICATE")

    return authorize


def read_key(file: str) -> str:
    """Return the API key in a file; empty without one. Raises ConfigError."""
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def _read(file: str) -> _Callers:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file}: expected a mapping of names to lists of SHA-256 digests, or to mappings")
    keys: list[tuple[bytes, Caller]] = []
    certificates: dict[str, Caller] = {}
    for name, entry in content.items():
        where = f"{file}: {name}"
        if not name or not isinstance(name, str):
            raise ConfigError(f"{where}: a name must be text")
        given = {"keys": entry} if isinstance(entry, list) else entry
        if not isinstance(given, dict) or given.keys() - {"keys", "certificates", "rights"}:
            raise ConfigError(f"{where}: expected a list of digests, or a mapping of keys, certificates and rights")
        caller = Caller(name, _rights(given.get("rights", [Right.GENERATE]), where))
        digests, names = _digests(given.get("keys", []), where), _texts(given.get("certificates", []), where)
        if not digests and not names:
            raise ConfigError(f"{where}: has neither keys nor certificates")
        keys += [(digest, caller) for digest in digests]
        certificates |= dict.fromkeys(names, caller)
    if len({digest for digest, _ in keys}) < len(keys):
        raise ConfigError(f"{file}: a key belongs to two callers")
    return _Callers(tuple(keys), certificates)


def _rights(value: Any, where: str) -> frozenset[Right]:
    try:
        return frozenset(map(Right, _texts(value, where)))
    except ValueError as error:
        raise ConfigError(f"{where}: rights must be of {', '.join(Right)}") from error


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{where}: expected a list of texts")
    return value


def _digests(value: Any, where: str) -> list[bytes]:
    digests = []
    for key in value if isinstance(value, list) else [None]:
        try:
            digest = bytes.fromhex(key) if isinstance(key, str) else b""
        except ValueError:
            digest = b""
        if len(digest) * 2 != _HEX_DIGITS:
            raise ConfigError(f"{where}: a digest must be {_HEX_DIGITS} hexadecimal digits (sha256sum of the key)")
        digests.append(digest)
    return digests
