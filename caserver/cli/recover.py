"""``caserver operator recover``: carries a stopped cluster into another list of nodes. Works on files, asks no agent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caserver.cli.agent import SOURCES, faults, load
from caserver.cli.flags import Command, Flag, Parsed, Takes, UsageError
from caserver.cli.output import complain, say
from caserver.errors import Corrupt, InvalidConfig

if TYPE_CHECKING:
    from caserver.config.agent_config import AgentConfig
    from caserver.raft.recovery import Export, Import

_SECRET_FILE = "cluster_secret"  # noqa: S105 - the name of a file


def _export(parsed: Parsed, _: Mapping[str, str]) -> int:
    # These load the Raft engine and the certificate library.
    from caserver.raft.disk import PosixDisk  # noqa: PLC0415
    from caserver.raft.journal import JournalFailed  # noqa: PLC0415
    from caserver.raft.recovery import RecoveryRefused, export  # noqa: PLC0415
    from caserver.state.machine import CAStateMachine  # noqa: PLC0415

    if parsed.arguments:
        raise UsageError(f"unexpected argument {parsed.arguments[0]}: the directory is given by -data-dir")
    if not parsed.values.get("data-dir"):
        raise UsageError("-data-dir is missing: the data directory of the stopped node")
    directory = Path(parsed.values["data-dir"])
    if not directory.is_dir():
        complain(f"{directory} is not a directory: give the data_dir of the stopped node")
        return 1
    try:
        disk = PosixDisk(directory)
        try:
            exported = export(disk, CAStateMachine())
        finally:
            disk.close()
            _give_to_owner(directory)
        file = Path(parsed.values.get("out") or f"{exported.node}.export")
        _write_new(file, exported.encode())
    except (RecoveryRefused, Corrupt, JournalFailed, OSError) as exc:
        complain(f"Nothing was exported: {exc}")
        return 1
    say(f"{_described(exported)}\nWritten to {file}. Keep this node stopped until the import is done on every node.")
    return 0


def _import(parsed: Parsed, environ: Mapping[str, str]) -> int:
    # These load the Raft engine and the certificate library.
    from caserver.raft.disk import PosixDisk  # noqa: PLC0415
    from caserver.raft.journal import JournalFailed  # noqa: PLC0415
    from caserver.raft.recovery import RecoveryRefused, choose, install  # noqa: PLC0415

    if not parsed.lists.get("config-file"):
        raise UsageError("-config-file is missing: the configuration that this node is to run with")
    if not parsed.arguments:
        raise UsageError("no export is given: name the files that `caserver operator recover export` wrote")
    try:
        config = load(parsed, environ)
        if config.data_dir is None:
            raise UsageError("data_dir is missing from the configuration: there is nowhere to import to")
        plan = choose(_read_exports(parsed.arguments), survivor=parsed.switch("survivor"))
        _require_keys(config, plan)
        disk = PosixDisk(config.data_dir)
        try:
            changed = install(disk, plan, node=config.node_name, names={config.node_name, *config.peers})
        finally:
            disk.close()
            _give_to_owner(config.data_dir)
    except InvalidConfig as exc:
        complain(faults("The configuration has faults:", exc))
        return 1
    except (RecoveryRefused, Corrupt, JournalFailed, OSError, ValueError) as exc:
        complain(f"Nothing was imported: {exc}")
        return 1
    _report(config, plan, changed=changed)
    return 0


def _give_to_owner(directory: Path) -> None:
    """Run by root, leave no file that the user of the directory, who runs the agent, cannot open."""
    if os.geteuid() != 0:
        return
    owner = directory.stat()
    for file in directory.iterdir():
        os.chown(file, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _write_new(file: Path, content: bytes) -> None:
    """Write a file that did not exist, for its owner alone, durable on return."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise OSError(f"{file} exists: move it away, or name another file with -out") from exc
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError:
        file.unlink(missing_ok=True)  # half an export is of no use to anyone
        raise


def _read_exports(files: Sequence[str]) -> list[Export]:
    from caserver.raft.recovery import Export  # noqa: PLC0415 - as above

    found = []
    for file in files:
        try:
            found.append(Export.decode(Path(file).read_bytes()))
        except Corrupt as exc:
            raise Corrupt(f"{file}: {exc}") from exc
    return found


def _require_keys(config: AgentConfig, plan: Import) -> None:
    """Corrupt unless the secrets of the configuration open what is imported: else the node would refuse to start."""
    from caserver.internode.keyring import Keyring, decode_secret, sealed_key_id  # noqa: PLC0415 - as above
    from caserver.state.codec import decode_state  # noqa: PLC0415
    from caserver.state.sealing import sealed_values  # noqa: PLC0415

    needed = {sealed_key_id(value) for value in sealed_values(decode_state(plan.chosen.snapshot.state)).values()}
    secrets = [secret.reveal() for secret in config.cluster_secrets]
    own = None if config.data_dir is None else config.data_dir / _SECRET_FILE
    if not secrets and own is not None and own.exists():
        secrets = [own.read_text().strip()]
    held = set(Keyring([decode_secret(each) for each in secrets]).key_ids) if secrets else set()
    if missing := sorted(needed - held):
        raise Corrupt(
            f"the secrets in it are sealed with key {missing[0]}, which this node's configuration does not hold: write the "
            "cluster_secret of the old nodes into it (of a single node without one: the content of cluster_secret in its "
            "data_dir)"
        )


def _described(exported: Export) -> str:
    term, index = exported.position
    standing = "" if exported.voter else " (it had no vote: it does not count)"
    return (
        f"Node {exported.node}{standing} of {', '.join(exported.members)}: cluster {exported.cluster_id or 'without an id'}, "
        f"generation {exported.generation[:20]}, log up to entry {index} of term {term}"
    )


def _report(config: AgentConfig, plan: Import, *, changed: bool) -> None:
    lines = [_described(each) for each in plan.exports]
    if not plan.is_majority:
        complain(
            f"WARNING: only {len(plan.exports)} of the {len(plan.chosen.members)} old nodes are known. What was acknowledged "
            f"by {', '.join(plan.unheard)} alone is LOST, and these nodes must never be started again with their old data."
        )
    names = ", ".join(sorted({config.node_name, *config.peers}))
    if changed:
        lines += [
            f"Node {config.node_name} of {names} begins generation {plan.generation} with that of {plan.chosen.node}.",
            "Import the same exports on every other node of this list, then start all: they elect once all are there.",
            "What a data directory held before is kept in *.old files; remove them when the cluster runs.",
        ]
    else:
        lines.append(f"Node {config.node_name} has imported this before; nothing was changed.")
    say("\n".join(lines))


COMMANDS = {
    command.words: command
    for command in (
        Command(
            words="operator recover export",
            usage="-data-dir=DIR [-out=FILE]",
            description="Writes what a stopped node holds into a file, to be imported on the nodes of a new list. Secrets "
            "in it stay sealed with the cluster secret.",
            example="caserver operator recover export -data-dir=/var/lib/caserver -out=ca1.export",
            flags=(
                (
                    "Command Options",
                    (
                        Flag("data-dir", "Data directory of the node, which must be stopped.", placeholder="path"),
                        Flag(
                            "out",
                            "File to write, which must not exist. The default is NODE.export.",
                            placeholder="path",
                        ),
                    ),
                ),
            ),
            run=_export,
        ),
        Command(
            words="operator recover import",
            usage="-config-file=FILE [-survivor] EXPORT...",
            description="Makes this node, which must be stopped, one of the new list of nodes that its configuration names. "
            "Takes the exports of a majority of the old nodes, the same on every node of the new list, and begins with the "
            "one that holds most.",
            example="caserver operator recover import -config-file=/etc/caserver/ca4.hcl ca1.export ca2.export",
            flags=(
                ("Configuration", SOURCES),
                (
                    "Command Options",
                    (
                        Flag(
                            "survivor",
                            "Go on with less than a majority because the other old nodes are lost for good. What only they "
                            "acknowledged is lost.",
                            takes=Takes.NOTHING,
                        ),
                    ),
                ),
            ),
            run=_import,
        ),
    )
}
