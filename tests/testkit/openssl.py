"""The ``openssl`` program as an operator uses it: making a root of one's own, and judging a chain."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SUBJECT = "/C=US/ST=California/L=San Francisco/O=Example/CN=localhost"


@dataclass(frozen=True, slots=True)
class OwnRoot:
    """A root made by an operator, PEM."""

    key: str
    certificate: str

    def configuration(self) -> dict[str, object]:
        """The body of the documentation's PUT."""
        return {
            "Provider": "consul",
            "Config": {"PrivateKey": self.key, "RootCert": self.certificate, "RotationPeriod": "2160h"},
        }


def run(*arguments: str) -> str:
    """Run openssl and return what it prints; its own complaint is the failure."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"openssl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def make_root(directory: Path, trust_domain: str) -> OwnRoot:
    """RSA, with everything that a root has to have."""
    directory.mkdir(parents=True, exist_ok=True)
    key, certificate = directory / "root.key", directory / "root.crt"
    extensions = (
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,digitalSignature,keyCertSign,cRLSign",
        f"subjectAltName=URI:spiffe://{trust_domain}",
    )
    added = [word for extension in extensions for word in ("-addext", extension)]
    made = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    run("req", "-x509", *made, "-days", "3650", "-sha256", "-subj", SUBJECT, *added)
    return OwnRoot(key.read_text(), certificate.read_text())


def make_root_without_constraints(directory: Path, trust_domain: str) -> OwnRoot:
    """As the example in Consul's documentation is: a URI SAN and no other extension."""
    directory.mkdir(parents=True, exist_ok=True)
    key, certificate, request = directory / "root.key", directory / "root.crt", directory / "root.csr"
    extensions = directory / "extensions"
    extensions.write_text(f"subjectAltName=URI:spiffe://{trust_domain}\n")
    run("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(request), "-subj", SUBJECT)
    made = ["-in", str(request), "-signkey", str(key), "-out", str(certificate), "-extfile", str(extensions)]
    run("x509", "-req", *made, "-days", "3650", "-sha256")
    return OwnRoot(key.read_text(), certificate.read_text())


def split(pem: str) -> list[str]:
    """The certificates of a PEM text, one text each."""
    end = "-----END CERTIFICATE-----\n"
    return [part + end for part in pem.replace("\r", "").split(end) if part.strip()]


def accepts(directory: Path, chain: str, *roots: str) -> bool:
    """``openssl verify``: the first certificate of ``chain`` under ``roots`` alone, helped by the rest of the chain."""
    leaf, *rest = split(chain)
    files = {"leaf": leaf, "rest": "".join(rest), "roots": "".join(root.rstrip("\n") + "\n" for root in roots)}
    for name, text in files.items():
        (directory / name).write_text(text)
    untrusted = ["-untrusted", str(directory / "rest")] if rest else []
    command = ["openssl", "verify", "-x509_strict", "-no-CApath", "-no-CAstore", "-CAfile", str(directory / "roots")]
    done = subprocess.run(
        [*command, *untrusted, str(directory / "leaf")], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode == 0
