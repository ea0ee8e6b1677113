"""The error tree: every failure that may reach a caller, without a status code in sight.

    CaserverError                    detail is written for the caller and safe to show
      InvalidRequest                 the caller must change something
        InvalidQuery                 a query option or header
        InvalidCSR                   the certificate signing request
        InvalidConfig                the CA configuration; first line is Consul's text, one line per further fault
        InvalidArchive               the snapshot that is to be restored
        TooLarge                     a body over its limit
        Misdirected                  sent by a browser to a name that is not this node's
      PermissionDenied
      NotFound
      RateLimited                    carries retry_after
      Conflict                       decided on a stale index
      ConnectDisabled                this cluster was started without Connect
      ACLDisabled                    this node was started without ACLs
      Unavailable                    trying again may help
        NoLeader                     nobody leads right now
        NotLeader                    this node does not lead (drives forwarding, never leaves the internal routes)
        NotInitialized               the CA has no active root yet
        CommitFailed                 certainly not committed
        CommitUnknown                may have been committed; the caller must read before repeating
        ProviderUnavailable          timeout, sealed, 5xx
      ProviderRefused                the provider's backend understood and said no
      ReloadFailed                   the settings of this node, read again, have faults

Not in the tree: plain bugs (logged with a traceback, rendered as a bare 500) and ``Corrupt`` (undecodable log entry,
journal or snapshot: the process stops and says what to do).

Status codes live in ``api.status`` alone. Across the internal hop an error travels as ``kind`` and ``detail`` and is
raised again as the same class by ``from_kind``.
"""

from __future__ import annotations


class CaserverError(Exception):
    """A failure whose ``detail`` was written for the caller; never holds a key, a token or a secret."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    @property
    def kind(self) -> str:
        """Name under which the error crosses the internal hop."""
        return type(self).__name__


class InvalidRequest(CaserverError):
    """The request itself is wrong; repeating it unchanged cannot help."""


class InvalidQuery(InvalidRequest):
    """A query option or request header is malformed or contradictory."""


class InvalidCSR(InvalidRequest):
    """The certificate signing request is malformed, not self-signed correctly, or asks for another identity."""


class InvalidConfig(InvalidRequest):
    """The CA configuration is refused; the first line is Consul's text, further lines name every fault."""


class InvalidArchive(InvalidRequest):
    """The file is no snapshot that can be restored here; nothing was changed."""


class TooLarge(InvalidRequest):
    """The request body is over the limit of its route."""


class Misdirected(InvalidRequest):
    """A browser called this node by a name that is not known to be its own."""


class PermissionDenied(CaserverError):
    """The caller's token does not allow the operation."""


class NotFound(CaserverError):
    """The named thing does not exist."""


class RateLimited(CaserverError):
    """The CSR limiter refused the request at once (Consul: ``Rate limit reached, try again later``)."""

    def __init__(self, detail: str, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after  # seconds until one token is free


class Conflict(CaserverError):
    """The operation was decided on an index that is no longer current; nothing was changed."""


class ConnectDisabled(CaserverError):
    """Connect is disabled on this agent (Consul answers 500 with this very text)."""

    def __init__(self, detail: str = "Connect must be enabled in order to use this endpoint") -> None:
        super().__init__(detail)


class ACLDisabled(CaserverError):
    """ACLs are disabled on this agent (Consul answers 401 with this very text)."""

    def __init__(self, detail: str = "ACL support disabled") -> None:
        super().__init__(detail)


class Unavailable(CaserverError):
    """The operation could not be done now; trying again may help."""


class NoLeader(Unavailable):
    """No leader was found within the time that a call may be held."""

    def __init__(self, detail: str = "No cluster leader") -> None:
        super().__init__(detail)


class NotLeader(Unavailable):
    """This node does not lead (any more); the forwarder tries the next one."""


class NotInitialized(Unavailable):
    """The CA has no active root yet."""


class CommitFailed(Unavailable):
    """The command was certainly not committed."""


class CommitUnknown(Unavailable):
    """The command may or may not have been committed; read before repeating."""


class ProviderUnavailable(Unavailable):
    """The provider's backend did not answer, is sealed, or failed."""


class ProviderRefused(CaserverError):
    """The provider's backend understood the request and refused it."""


class ReloadFailed(CaserverError):
    """What was read in place of a running agent's settings has faults; those in force stay."""


class Corrupt(Exception):
    """Durable bytes cannot be read as what was written; the node must not run on them."""


def _classes(root: type[CaserverError]) -> dict[str, type[CaserverError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _classes(child)
    return found


def from_kind(kind: str, detail: str) -> CaserverError:
    """Rebuild an error that crossed the internal hop; an unknown kind becomes a plain ``Unavailable``."""
    return _classes(CaserverError).get(kind, Unavailable)(detail)
