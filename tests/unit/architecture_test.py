"""The shape of the house: where every file belongs, who may import whom, and who alone may touch what.

Raising a number or adding an exception here needs its reason in the same commit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "caserver"
LINES_MAX = 600
EXPORTS_MAX = 6  # names that a package's __init__ offers
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "types", "misc", "service"}

# Top to bottom; a package stands for itself ("" is its __init__). Imports go downwards, or stay within one package.
LAYERS: tuple[Mapping[str, set[str]], ...] = (
    {
        "": {"__main__"},
        "cli": {
            "",
            "acl",
            "agent",
            "cleanup",
            "completion",
            "connect_ca",
            "flags",
            "nodes",
            "operator",
            "output",
            "recover",
            "snapshot",
        },
    },
    {"": {"acl_reset", "daemon", "listeners", "own_secret", "reloading", "supervision"}},
    {
        "api": {
            "",
            "acl",
            "acl_reference",
            "agent",
            "connect_ca",
            "connection",
            "metrics",
            "nodes",
            "openapi",
            "operator",
            "origin",
            "pace",
            "query",
            "reference",
            "routes",
            "schemas",
            "server",
            "snapshot",
            "status",
        }
    },
    {"": {"backup", "leaf_cache", "node_gate", "nodes_wire", "settings_wire"}},
    {"forwarding": {"", "channel", "leader"}},
    {
        "authority": {
            "",
            "authority",
            "cleanups",
            "clock_guard",
            "custody",
            "founding",
            "gate",
            "issuance",
            "maintenance",
            "operations",
            "plan",
            "ports",
            "preparation",
            "probe",
            "resealing",
            "restoration",
            "rotation",
            "serials",
            "tending",
            "tokens",
        }
    },
    {
        "raft": {
            "",
            "compaction",
            "crossing",
            "data_dir",
            "disk",
            "engine",
            "feeder",
            "frames",
            "guard",
            "journal",
            "messages",
            "ports",
            "recovery",
            "replicated_log",
            "seam",
            "snapshot_file",
            "stored_keys",
            "status",
            "streams",
            "thread",
        },
        "providers": {
            "",
            "builtin",
            "vault",
            "vault.crossing",
            "vault.endpoint",
            "vault.engine",
            "vault.fitness",
            "vault.kind",
            "vault.login",
            "vault.naming",
            "vault.preflight",
            "vault.provider",
            "vault.session",
            "vault.tls_files",
            "vault.transport",
            "vault.upkeep",
        },
        "client": {"", "client"},
    },
    {"": {"acl", "acl_requests", "acl_wire", "archive", "cleanup_requests", "requests", "wire"}},
    {
        "state": {
            "",
            "acl",
            "acl_apply",
            "acl_codec",
            "acl_commands",
            "apply",
            "builtin_keys",
            "codec",
            "commands",
            "config_reader",
            "configuration",
            "key_change",
            "ledger",
            "lifecycle",
            "machine",
            "model",
            "repeats",
            "restore_apply",
            "sealing",
            "shapes",
            "vault_configuration",
            "vault_keys",
        }
    },
    {
        "pki": {"", "certificates", "chain", "csr", "keys", "leaf_der", "proof", "spiffe", "tls"},
        "internode": {"", "identity", "keyring", "membership"},
        "config": {
            "",
            "acl_settings",
            "addresses",
            "agent_config",
            "consul_keys",
            "document",
            "interfaces",
            "listeners",
            "reading",
            "servers",
            "sources",
            "tls_settings",
        },
    },
    {"telemetry": {"", "logs", "metrics"}},
    {"": {"", "descriptors", "environment", "errors", "fields", "gojson", "listening", "unix_socket"}},
)

# (importing package or module, imported module): why this one may look up or sideways.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("caserver.config.servers", "caserver.internode.keyring"): "what a cluster secret is, only the keyring says",
    ("caserver.providers", "caserver.authority.ports"): "a port belongs to its user; providers speak in its values",
    ("caserver.state", "caserver.raft.ports"): "the state machine matches the log's port and selects on its Leadership",
    ("caserver.internode", "caserver.pki"): "node certificates are certificates; TLS contexts have one home",
}
# Downwards, and forbidden all the same: (importer, imported).
FORBIDDEN = {
    ("caserver.raft", "caserver.state"): "the log replicates bytes for a state machine that it is handed",
    ("caserver.raft", "caserver.requests"): "the log knows nothing of what is asked of the authority",
    ("caserver.state", "caserver.config"): "a node's own settings never decide what is replicated",
    ("caserver.pki", "caserver.config"): "certificates are made from arguments",
}
OWNERS = {
    "pysyncobj": {"caserver.raft.engine", "caserver.raft.journal", "caserver.raft.seam"},
    "hvac": {"caserver.providers.vault.session"},
    "hcl2": {"caserver.config.document"},
    "lark": {"caserver.config.document"},
}
CONTEXT_MAKERS = {"SSLContext", "create_default_context", "_create_unverified_context"}
AMBIENT_OWNERS = {"caserver.environment", "caserver.raft.thread", "caserver.raft.seam"}
AMBIENT_MODULES = {"time", "random", "secrets", "threading", "concurrent.futures", "multiprocessing"}
AMBIENT_ATTRIBUTES = {
    "os": {"urandom", "getrandom"},
    "uuid": {"uuid1", "uuid4"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "asyncio": {"to_thread"},
}
AMBIENT_METHODS = {"run_in_executor"}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file; ``from a import b`` counts as ``a.b`` and ``a``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name lives"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def dotted(node: ast.expr) -> str:
    """``datetime.datetime.now`` of an attribute chain, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def ambient_uses(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Clock, randomness and threads taken out of the air."""
    for name in imports(nodes):
        head, _, last = name.rpartition(".")
        if any(within(name, module) for module in AMBIENT_MODULES) or last in AMBIENT_ATTRIBUTES.get(head, set()):
            yield f"import {name}"
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        owner = dotted(node.value).rpartition(".")[2]
        if node.attr in AMBIENT_ATTRIBUTES.get(owner, set()) or node.attr in AMBIENT_METHODS:
            yield f"{owner}.{node.attr} (line {node.lineno})"


def makes_context(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in CONTEXT_MAKERS


@dataclass(frozen=True, slots=True)
class Module:
    """What is asked about one source file of the product; its tree is not kept, a hundred of them slow every test down."""

    name: str
    path: Path
    imports: tuple[str, ...]
    ambient: tuple[str, ...]
    makes_contexts: bool


def read_module(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    tree = ast.parse(path.read_text(), filename=str(path))
    nodes = tuple(ast.walk(tree))
    return Module(
        name=".".join(parts[:-1] if parts[-1] == "__init__" else parts),
        path=path,
        imports=tuple(imports(nodes)),
        ambient=tuple(ambient_uses(nodes)),
        makes_contexts=any(makes_context(node) for node in nodes),
    )


MODULES = tuple(read_module(path) for path in sorted(PACKAGE.rglob("*.py")))
NAMES = {module.name for module in MODULES}


def placed() -> dict[str, int]:
    """Every module of LAYERS by its dotted name."""
    found: dict[str, int] = {}
    for depth, layer in enumerate(LAYERS):
        for package, files in layer.items():
            for file in files:
                found[".".join(part for part in ("caserver", package, file) if part)] = depth
    return found


DEPTHS = placed()


def imported_modules(module: Module) -> set[str]:
    """The product's own modules that ``module`` imports (``from package import module`` included)."""
    found = set()
    for name in module.imports:
        if not within(name, "caserver"):
            continue
        owner = name if name in NAMES else name.rpartition(".")[0]
        found.add(owner)
    return found - {module.name}


def package_of(name: str) -> str:
    """``caserver.raft.engine`` -> ``caserver.raft``; a file beside the packages is its own."""
    return ".".join(name.split(".")[:2])


def excepted(importer: str, imported: str) -> bool:
    return any(within(importer, above) and within(imported, below) for above, below in EXCEPTIONS)


def layer_fault(importer: str, imported: str) -> str | None:
    """Why this import may not be, or None."""
    for (above, below), reason in FORBIDDEN.items():
        if within(importer, above) and within(imported, below):
            return f"{importer} imports {imported}: {reason}"
    if package_of(importer) == package_of(imported) or excepted(importer, imported):
        return None
    depth, other = DEPTHS.get(importer, -1), DEPTHS.get(imported, -1)
    loose = depth == other and importer.count(".") == imported.count(".") == 1  # files of one layer beside each other
    if depth < other or loose:
        return None
    return f"{importer} (layer {depth + 1}) imports {imported} (layer {other + 1})"


def test_every_file_has_its_place() -> None:
    unplaced = sorted(NAMES - set(DEPTHS))

    assert not unplaced, f"place these in LAYERS: {unplaced}"


def test_every_place_has_its_file() -> None:
    missing = sorted(set(DEPTHS) - NAMES)

    assert not missing, f"these are placed but do not exist: {missing}"


def test_imports_go_downwards() -> None:
    faults = [
        fault
        for module in MODULES
        for imported in sorted(imported_modules(module))
        if (fault := layer_fault(module.name, imported))
    ]

    assert not faults


def test_no_import_cycle() -> None:
    graph = {module.name: imported_modules(module) for module in MODULES}

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(f"import cycle: {' -> '.join(reversed(cycle.args[1]))}")


def test_exceptions_are_used() -> None:
    edges = {(module.name, imported) for module in MODULES for imported in imported_modules(module)}
    idle = [
        pair
        for pair in EXCEPTIONS
        if not any(within(importer, pair[0]) and within(imported, pair[1]) for importer, imported in edges)
    ]

    assert not idle, "an exception that nobody needs is an open door"


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_dependency_has_its_owners(dependency: str) -> None:
    users = {module.name for module in MODULES if any(within(name, dependency) for name in module.imports)}

    assert users <= OWNERS[dependency]


def test_tls_contexts_are_made_in_one_place() -> None:
    assert {module.name for module in MODULES if module.makes_contexts} == {"caserver.pki.tls"}


def test_clock_chance_and_threads_are_handed_in() -> None:
    uses = {module.name: module.ambient for module in MODULES if module.ambient}

    assert set(uses) == AMBIENT_OWNERS, uses


def test_files_are_short_and_well_named() -> None:
    paths = [path for folder in ("caserver", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in paths}

    assert len(lengths) > len(MODULES)
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_MAX}
    assert not [name for name in lengths if Path(name).stem in BANNED_NAMES]


def test_packages_export_few_names() -> None:
    exports = {
        module.name: sum(1 for name in module.imports if within(name, "caserver"))
        for module in MODULES
        if module.path.name == "__init__.py"
    }

    assert {name: count for name, count in exports.items() if count > EXPORTS_MAX and name != "caserver.cli"} == {}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("caserver.state.apply", "caserver.authority.plan"),  # upwards
        ("caserver.raft.engine", "caserver.state.model"),  # forbidden though downwards
        ("caserver.providers.builtin", "caserver.raft.thread"),  # sideways
        ("caserver.errors", "caserver.api.status"),
        (
            "caserver.newcomer",
            "caserver.errors",
        ),  # not placed: the other test names it, this one lets it import nothing up
    ],
)
def test_the_layer_rule_bites(importer: str, imported: str) -> None:
    fault = layer_fault(importer, imported)

    assert (fault is None) == (importer == "caserver.newcomer")


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from random import random",
        "import os\nos.urandom(8)",
        "from os import urandom",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "import uuid\nuuid.uuid4()",
        "import asyncio\nasyncio.to_thread(print)",
        "loop.run_in_executor(None, print)",
        "from concurrent.futures import ThreadPoolExecutor",
    ],
)
def test_the_ambient_rule_bites(source: str) -> None:
    assert list(ambient_uses(tuple(ast.walk(ast.parse(source)))))
