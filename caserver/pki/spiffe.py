"""Names of the mesh: cluster ids, trust domains, SPIFFE IDs of services and the common names derived from them.

A trust domain is ``<cluster id>.consul``; a service is ``spiffe://<trust domain>/ns/default/dc/<dc>/svc/<service>`` with
the service percent-encoded the way Go's ``url.URL`` writes a path, which is what Consul's agents put into their CSRs. A
URI is decoded exactly once, here, and everything after compares decoded names.
"""

from __future__ import annotations

import re
import uuid
import warnings
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from cryptography import x509

from caserver.errors import InvalidCSR, InvalidRequest

NAMESPACE = "default"
MAX_URI_BYTES = 2048  # SPIFFE-ID 2.3: implementations must not make longer ones
MAX_SERVICE_BYTES = 1024  # percent-encoded; leaves room for trust domain and datacenter within MAX_URI_BYTES
MAX_COMMON_NAME = 64  # RFC 5280 ub-common-name

_CLUSTER_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_SERVICE_PATH = re.compile(r"/ns/([^/]+)/dc/([^/]+)/svc/([^/]+)")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_PATH_SAFE = "$&+,:;=@~"  # what Go's url.URL leaves bare in a path beside letters, digits and "-._"


def cluster_id_from(raw16: bytes) -> str:
    """A version 4 UUID, lower case, made of 16 random bytes."""
    return str(uuid.UUID(bytes=raw16, version=4))


def normalise_cluster_id(text: str) -> str:
    """Lower-case form of a UUID; ValueError says what is wrong (Consul: ``cluster_id`` of ``ca_config``)."""
    lowered = text.lower()
    if _CLUSTER_ID.fullmatch(lowered) is None:
        raise ValueError("cluster_id was supplied but was not a valid UUID")
    return lowered


@dataclass(frozen=True, slots=True)
class ServiceID:
    """A service of the mesh, all parts decoded."""

    trust_domain: str
    datacenter: str
    service: str
    namespace: str = NAMESPACE

    @property
    def uri(self) -> str:
        """The canonical SPIFFE URI, ASCII."""
        path = f"/ns/{_escape(self.namespace)}/dc/{_escape(self.datacenter)}/svc/{_escape(self.service)}"
        return f"spiffe://{self.trust_domain}{path}"


def _escape(segment: str) -> str:
    return quote(segment, safe=_PATH_SAFE)


def _unencodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: bytes of a path that were not UTF-8
        return True
    return False


def _service_fault(service: str) -> str | None:
    if _unencodable(service):
        return "is not UTF-8"
    if not service.isprintable():  # control characters, and what hides or turns around the text about it
        return "holds a character that does not print"
    if service in {".", ".."}:
        return f"is {service!r}, which paths give another meaning"
    if len(_escape(service)) > MAX_SERVICE_BYTES:
        return f"is longer than {MAX_SERVICE_BYTES} bytes when percent-encoded"
    return None


def check_service_name(name: str, *, trust_domain: str = "<trust domain>", datacenter: str = "<dc>") -> None:
    """Refuse with InvalidRequest a decoded service name that cannot stand in a SPIFFE ID of this CA.

    ``trust_domain`` and ``datacenter`` only fill Consul's text for a name with a slash.
    """
    if not name:
        raise InvalidRequest("URI must be either service or agent")
    if "/" in name:
        uri = f"spiffe://{trust_domain}/ns/{NAMESPACE}/dc/{datacenter}/svc/{quote(name, safe=_PATH_SAFE + '/', errors='replace')}"
        raise InvalidRequest(f"SPIFFE ID is not in the expected format: {uri}")
    fault = _service_fault(name)
    if fault is not None:
        raise InvalidRequest(f"service name {fault}; choose a name that can be written in a SPIFFE ID")


def parse_service_uri(uri: str) -> ServiceID:
    """Read the URI of a CSR or leaf; InvalidCSR with Consul's text if it does not name a service.

    Scheme and trust domain compare without regard to case and come out in lower case; each path segment is
    percent-decoded once. Query, fragment, user and port are refused, since no SPIFFE ID has them.
    """
    if len(uri) > MAX_URI_BYTES:
        raise InvalidCSR(f"SPIFFE ID is {len(uri)} bytes long; at most {MAX_URI_BYTES} are allowed")
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() != "spiffe":
        raise InvalidCSR("SPIFFE ID must have 'spiffe' scheme")
    trust_domain, slash, path = rest.partition("/")
    matched = _SERVICE_PATH.fullmatch(slash + path)
    if matched is None or not _is_plain(uri) or _TRUST_DOMAIN.fullmatch(trust_domain.lower()) is None:
        raise InvalidCSR(f"SPIFFE ID is not in the expected format: {_shown(uri)}")
    namespace, datacenter, service = (_decode(segment, uri) for segment in matched.groups())
    fault = _service_fault(service)
    if fault is not None:
        raise InvalidCSR(f"Invalid service: the name in {_shown(uri)} {fault}")
    return ServiceID(trust_domain.lower(), datacenter, service, namespace)


def _is_plain(uri: str) -> bool:
    return uri.isascii() and uri.isprintable() and not set(uri) & set(' ?#"<>\\^`{|}') and not _BAD_PERCENT.search(uri)


def _shown(uri: str) -> str:
    """The URI for a message, with whatever could upset a log escaped."""
    return quote(uri, safe=_PATH_SAFE + "/%?#", errors="replace")


def _decode(segment: str, uri: str) -> str:
    try:
        decoded = unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidCSR(f"SPIFFE ID is not in the expected format: {_shown(uri)}") from exc
    if "/" in decoded:
        raise InvalidCSR(f"SPIFFE ID is not in the expected format: {_shown(uri)}")
    return decoded


def is_other_identity(uri: str) -> bool:
    """Whether ``uri`` is one that Consul's mesh knows, though not of a service: of an agent, or of the CA itself."""
    scheme, _, rest = uri.partition("://")
    trust_domain, _, path = rest.partition("/")
    known = not path or re.fullmatch(r"agent/client/dc/[^/]+/id/[^/]+", path) is not None
    return scheme.lower() == "spiffe" and known and _TRUST_DOMAIN.fullmatch(trust_domain.lower()) is not None


def signing_uri(trust_domain: str) -> str:
    """The URI that a root of the trust domain carries (SPIFFE X509-SVID, signing certificates)."""
    return f"spiffe://{trust_domain}"


def leaf_common_name(service: str, trust_domain: str) -> str:
    """Common name of a leaf as Consul forms it (``ServiceCN``).

    The service loses everything but ``[a-z0-9]`` after lower-casing and is cut so that the whole fits 64 characters;
    a name of other characters only leaves an empty first label, as it does there.
    """
    suffix = f".svc.{NAMESPACE}.{trust_domain[:8]}.consul"
    label = re.sub("[^a-z0-9]", "", service.lower())
    return label[: MAX_COMMON_NAME - len(suffix)] + suffix


def cluster_id_of_root(pem: str) -> str | None:
    """Cluster id in the only URI SAN of a root certificate; None if the root names none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about serial numbers that are not positive: roots are refused for them
            certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        return None
    scheme, _, trust_domain = uris[0].lower().partition("://")
    cluster_id, dot, domain = trust_domain.partition(".")
    if scheme != "spiffe" or dot + domain != ".consul" or _CLUSTER_ID.fullmatch(cluster_id) is None:
        return None
    return cluster_id
