"""The one place where errors meet HTTP: which status an error has and which text it shows.

Where Consul answers a caller's mistake with 500, the status here is 4xx and the text stays Consul's.
"""

from __future__ import annotations

from http import HTTPStatus

from caserver import errors

# The most derived class decides; every class of the tree finds an entry through its bases.
_STATUS: dict[type[errors.CaserverError], int] = {
    errors.CaserverError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.Misdirected: HTTPStatus.MISDIRECTED_REQUEST,
    errors.PermissionDenied: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.ConnectDisabled: HTTPStatus.INTERNAL_SERVER_ERROR,  # Consul's, and its clients look for it
    errors.ACLDisabled: HTTPStatus.UNAUTHORIZED,  # Consul's, and its clients look for it
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.NoLeader: HTTPStatus.INTERNAL_SERVER_ERROR,  # Consul's, and its clients retry on it
    errors.ProviderRefused: HTTPStatus.BAD_GATEWAY,
    errors.ReloadFailed: HTTPStatus.INTERNAL_SERVER_ERROR,  # Consul's; the fault is in the files, not in the request
}
UNKNOWN_OUTCOME = "outcome unknown, read before repeating"
INTERNAL_ERROR = "internal error"

OK = int(HTTPStatus.OK)
MOVED = int(HTTPStatus.MOVED_PERMANENTLY)
BAD_REQUEST = int(HTTPStatus.BAD_REQUEST)
FORBIDDEN = int(HTTPStatus.FORBIDDEN)
UNAUTHORIZED = int(HTTPStatus.UNAUTHORIZED)
NOT_FOUND = int(HTTPStatus.NOT_FOUND)
METHOD_NOT_ALLOWED = int(HTTPStatus.METHOD_NOT_ALLOWED)
CONFLICT = int(HTTPStatus.CONFLICT)
TOO_LARGE = int(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
MISDIRECTED = int(HTTPStatus.MISDIRECTED_REQUEST)
RATE_LIMITED = int(HTTPStatus.TOO_MANY_REQUESTS)
REFUSED_BEHIND = int(HTTPStatus.BAD_GATEWAY)  # by the backend of the provider
SLOW_REQUEST = int(HTTPStatus.REQUEST_TIMEOUT)
HEAD_TOO_LARGE = int(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
BUG = int(HTTPStatus.INTERNAL_SERVER_ERROR)
UNHEALTHY = int(HTTPStatus.TOO_MANY_REQUESTS)  # Consul's, for a cluster that is not well
NOT_READY = int(HTTPStatus.SERVICE_UNAVAILABLE)


EVERY = frozenset(map(int, _STATUS.values()))  # what an error may be answered with


def status_of(error: errors.CaserverError) -> int:
    """Status code of an error."""
    return next(int(_STATUS[each]) for each in type(error).__mro__ if each in _STATUS)


def text_of(error: errors.CaserverError) -> str:
    """What the body says; an unresolvable outcome always says so first."""
    if isinstance(error, errors.CommitUnknown) and not error.detail.startswith(UNKNOWN_OUTCOME):
        return f"{UNKNOWN_OUTCOME}\n{error.detail}" if error.detail else UNKNOWN_OUTCOME
    return error.detail
