"""Who may call what."""

from collections.abc import Callable
from typing import Any

from services.common.errors import PermissionDenied
from services.common.tls import TlsConfig, peer_names

Authorize = Callable[[str, Any], None]
"""(full method name, servicer context): raises ServiceError unless the caller may call the method."""


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
