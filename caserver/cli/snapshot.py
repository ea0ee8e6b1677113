"""``caserver snapshot``: the whole state as a file, saved, looked at, restored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from caserver.cli.flags import HTTP_GROUP, Command, Parsed, client, query
from caserver.cli.output import chosen_format, complain, failed, format_flag, say, tabbed
from caserver.client import ClientError

if TYPE_CHECKING:
    from caserver.archive import Meta

_FORMATS = ("table", "json")
_COLUMN = 13  # as wide as Consul's


def _save(parsed: Parsed, environ: Mapping[str, str]) -> int:
    from caserver.archive import read_meta  # noqa: PLC0415 - loads the certificate library, which `-h` has no use for
    from caserver.errors import InvalidArchive  # noqa: PLC0415

    target = _file(parsed)
    if target is None:
        return 1
    draft = target.with_name(target.name + ".unverified")
    try:
        with _opened(draft) as file:
            answer = client(parsed, environ).save_snapshot(file, **query(parsed))
            file.seek(0)
            read_meta(file)
            os.fsync(file.fileno())
        draft.replace(target)
        _sync_directory(target.parent)
    except ClientError as exc:
        _discard(draft)
        return failed("Error saving snapshot", exc)
    except InvalidArchive as exc:
        _discard(draft)
        complain(f"Error verifying snapshot: {exc.detail}")
        return 1
    except OSError as exc:
        _discard(draft)
        complain(f"Error writing snapshot file: {exc.filename or draft}: {exc.strerror}")
        return 1
    say(f"Saved and verified snapshot to index {answer.headers.get('X-Consul-Index', '')}")
    return 0


def _opened(draft: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A new file that its owner alone can read."""
    draft.unlink(missing_ok=True)
    return os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(draft: Path) -> None:
    with contextlib.suppress(OSError):
        draft.unlink(missing_ok=True)


def _restore(parsed: Parsed, environ: Mapping[str, str]) -> int:
    source = _file(parsed)
    if source is None:
        return 1
    try:
        with source.open("rb") as file:
            client(parsed, environ).restore_snapshot(file, **query(parsed))
    except ClientError as exc:
        return failed("Error restoring snapshot", exc)
    except OSError as exc:
        return _unopened(source, exc)
    say("Restored snapshot")
    return 0


def _inspect(parsed: Parsed, _: Mapping[str, str]) -> int:
    from caserver.archive import read_meta  # noqa: PLC0415 - see ``_save``
    from caserver.errors import InvalidArchive  # noqa: PLC0415

    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    source = _file(parsed)
    if source is None:
        return 1
    try:
        with source.open("rb") as file:
            meta = read_meta(file)
    except OSError as exc:
        return _unopened(source, exc)
    except InvalidArchive as exc:
        complain(f"Error verifying snapshot: {exc.detail}")
        return 1
    facts = _facts(meta)
    if layout == "json":
        say(tabbed(facts))
    else:
        say("".join(f"{name.ljust(_COLUMN)}{value}\n" for name, value in facts.items()) + "\n")
    return 0


def _facts(meta: Meta) -> dict[str, object]:
    """What Consul shows, in its order."""
    return {"ID": meta.id, "Size": meta.size, "Index": meta.index, "Term": meta.term, "Version": meta.version}


def _file(parsed: Parsed) -> Path | None:
    """The one file that was named; None after a complaint."""
    if not parsed.arguments:
        complain("Missing FILE argument")
        return None
    if len(parsed.arguments) > 1:
        complain(f"Too many arguments (expected 1, got {len(parsed.arguments)})")
        return None
    return Path(parsed.arguments[0])


def _unopened(source: Path, exc: OSError) -> int:
    complain(f"Error opening snapshot file: open {source}: {(exc.strerror or str(exc)).lower()}")
    return 1


COMMANDS = {
    command.words: command
    for command in (
        Command(
            words="snapshot save",
            usage="[options] FILE",
            description="Saves a snapshot of the whole state: roots, configuration, ledger, tokens and policies. It is "
            "verified before it gets its name, and its owner alone can read it.\n\nKeys and secrets are in it as in the log, "
            "sealed with the cluster secret: keep that secret too, and somewhere else. With ACLs it takes a management "
            "token.",
            example="caserver snapshot save backup.snap",
            flags=(HTTP_GROUP,),
            run=_save,
        ),
        Command(
            words="snapshot inspect",
            usage="[options] FILE",
            description="Verifies a snapshot file and displays what it says of itself. No server is asked.",
            example="caserver snapshot inspect backup.snap",
            flags=(("Command Options", (format_flag(*_FORMATS),)),),
            run=_inspect,
        ),
        Command(
            words="snapshot restore",
            usage="[options] FILE",
            description="Restores a snapshot on the whole cluster at once: what is in it takes the place of roots, "
            "configuration, ledger, tokens and policies. Nothing changes unless all of it is verified, and it takes the "
            "cluster secret that it was saved under. With ACLs it takes a management token.",
            example="caserver snapshot restore backup.snap",
            flags=(HTTP_GROUP,),
            run=_restore,
        ),
    )
}
