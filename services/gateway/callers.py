"""Who sends an HTTP request, and for which tenant it is served."""

from collections.abc import Mapping

from services.common.access import Access, Caller, Right
from services.common.errors import PermissionDenied


def caller_of(access: Access, headers: Mapping[str, str], *rights: Right) -> Caller:
    """Return the caller. Raises ServiceError when nobody knows it or it has none of the rights."""
    caller = access.identify(headers.get("authorization", ""))
    if not caller.may(*(rights or Right)):
        raise PermissionDenied(f"this needs the right {' or '.join(rights)}")
    return caller


def tenant_of(access: Access, headers: Mapping[str, str]) -> str:
    """Return for whom a request is served: its caller, or who it says where the caller may. Raises ServiceError."""
    caller = caller_of(access, headers, Right.GENERATE, Right.ACT_FOR_TENANTS)
    return caller.tenant(headers.get("x-tenant-id", ""))
