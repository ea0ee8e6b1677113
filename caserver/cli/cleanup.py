"""``caserver connect ca cleanup``: what is still to be removed at former CA providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caserver.cli.flags import HTTP_GROUP, Command, Parsed, UsageError, client, query
from caserver.cli.output import chosen_format, failed, format_flag, say, tabbed
from caserver.client import ClientError

_FORMATS = ("text", "json")


def _list(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    try:
        document = client(parsed, environ).cleanups(**query(parsed)).json()
    except ClientError as exc:
        return failed("Error listing the clean-ups", exc)
    owed = document.get("Cleanups") or []
    if layout == "json":
        say(tabbed(document))
    elif owed:
        say("\n".join(_shown(each) for each in owed))
    else:
        say("No clean-up is owed.")
    return 0


def _shown(owed: Mapping[str, Any]) -> str:
    rows = [("ID", owed.get("ID")), ("Provider", owed.get("Provider")), ("Address", owed.get("Address"))]
    rows += [("Namespace", owed.get("Namespace")), ("Path", owed.get("Path"))]
    rows += [("Left", thing) for thing in owed.get("Left") or ()]
    rows += [("Not Before", owed.get("NotBefore")), ("Reason", owed.get("Reason") or "the leader has not tried it yet")]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name.ljust(width)}  {value}\n" for name, value in rows if value)


def _forget(parsed: Parsed, environ: Mapping[str, str]) -> int:
    if len(parsed.arguments) != 1:
        raise UsageError("name one clean-up: caserver connect ca cleanup forget <id>")
    wanted, asking = parsed.arguments[0], client(parsed, environ)
    try:
        listed = asking.cleanups(**query(parsed)).json().get("Cleanups") or []
        asking.forget_cleanup(wanted, **query(parsed))
    except ClientError as exc:
        return failed("Error forgetting the clean-up", exc)
    say(f"Forgotten: {wanted}")
    for owed in listed:
        if owed.get("ID") == wanted and owed.get("Left"):
            say("What it would have removed stays, if it is there; remove it yourself:\n\n" + _shown(owed))
    return 0


COMMANDS = {
    command.words: command
    for command in (
        Command(
            words="connect ca cleanup list",
            usage="[options]",
            description="Lists what is still to be removed at the backends of former CA providers, and why it is not yet. "
            "It is tried again and again by whoever leads.",
            example="caserver connect ca cleanup list",
            flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
            run=_list,
        ),
        Command(
            words="connect ca cleanup forget",
            usage="[options] <id>",
            description="Gives up a clean-up, for a backend that is gone for good. Nothing is removed there, and nothing "
            "is tried again; the command prints what is left.",
            example="caserver connect ca cleanup forget 3-5a1f09b2",
            flags=(HTTP_GROUP,),
            run=_forget,
        ),
    )
}
