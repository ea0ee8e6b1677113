"""The command line: finds the verb, loads its module, turns what goes wrong into a message and an exit code.

Exit codes are Consul's: 0 done, 1 failed or misused, 127 for a first word that is no command.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from caserver.cli.flags import Command, UsageError
from caserver.cli.output import complain, say
from caserver.client import ClientError

EXIT_FAILED = 1
EXIT_NO_COMMAND = 127
EXIT_INTERRUPTED = 130

# Words of the verb -> (module of this package, what it does). Modules load when their verb is used.
VERBS: Mapping[str, tuple[str, str]] = {
    "acl bootstrap": ("acl", "Make the first management token"),
    "acl policy create": ("acl", "Make a policy"),
    "acl policy delete": ("acl", "Forget a policy"),
    "acl policy list": ("acl", "List the policies"),
    "acl policy read": ("acl", "Display a policy"),
    "acl policy update": ("acl", "Change a policy"),
    "acl token clone": ("acl", "Make a token that stands for what another one does"),
    "acl token create": ("acl", "Make a token"),
    "acl token delete": ("acl", "Forget a token"),
    "acl token list": ("acl", "List the tokens"),
    "acl token read": ("acl", "Display a token"),
    "acl token update": ("acl", "Change what a token stands for"),
    "agent": ("agent", "Run a node of the certificate authority"),
    "completion": ("completion", "Print the completion script of a shell"),
    "connect ca cleanup forget": ("cleanup", "Give up a clean-up that is owed at a former CA provider"),
    "connect ca cleanup list": ("cleanup", "List the clean-ups that are owed at former CA providers"),
    "connect ca get-config": ("connect_ca", "Display the current Connect Certificate Authority (CA) configuration"),
    "connect ca leaf": ("connect_ca", "Get the certificate and key of a service"),
    "connect ca roots": ("connect_ca", "Display the root certificates"),
    "connect ca set-config": ("connect_ca", "Modify the current Connect CA configuration"),
    "connect ca sign": ("connect_ca", "Have a certificate signing request signed"),
    "info": ("nodes", "Display what an agent says of itself"),
    "keygen": ("agent", "Generate a cluster secret"),
    "members": ("nodes", "Display the servers and which of them are alive"),
    "operator autopilot get-config": ("operator", "Display what the health of servers is judged by"),
    "operator keyring status": ("operator", "Display which keys of the cluster secret may go"),
    "operator recover export": ("recover", "Write what a stopped node holds into a file"),
    "operator recover import": ("recover", "Begin a new list of nodes with what the old nodes exported"),
    "operator raft list-peers": ("operator", "Display the servers and which of them leads"),
    "operator raft remove-peer": ("operator", "Say how a server leaves the cluster"),
    "operator raft transfer-leader": ("operator", "Let another server lead"),
    "reload": ("agent", "Have an agent read its configuration and TLS files again"),
    "snapshot inspect": ("snapshot", "Displays information about a snapshot file"),
    "snapshot restore": ("snapshot", "Restores a snapshot of the whole state"),
    "snapshot save": ("snapshot", "Saves a snapshot of the whole state"),
    "validate": ("agent", "Check a configuration without starting anything"),
    "version": ("agent", "Print the version"),
}
GROUPS: Mapping[str, str] = {
    "": "A replicated certificate authority for service meshes.",
    "acl": "This command has subcommands for tokens and policies.",
    "acl policy": "This command has subcommands for policies: what tokens grant.",
    "acl token": "This command has subcommands for tokens: what callers show.",
    "connect": "This command has subcommands for interacting with Connect.",
    "connect ca": "This command has subcommands for interacting with the Certificate Authority (CA) of Connect.",
    "connect ca cleanup": "This command has subcommands for what is still to be removed at former CA providers.",
    "operator": "This command has subcommands for operators of the cluster.",
    "operator autopilot": "This command has subcommands for the health of the servers.",
    "operator keyring": "This command has subcommands for the cluster secret.",
    "operator raft": "This command has subcommands for the consensus among the servers.",
    "snapshot": "This command has subcommands for saving, inspecting and restoring the state of the cluster.",
    "operator recover": "This command has subcommands for changing the list of servers, or recovering it, while all are stopped.",
}
_EXAMPLES: Mapping[str, str] = {
    "": "caserver agent -dev",
    "acl": "caserver acl bootstrap",
    "acl policy": "caserver acl policy list",
    "acl token": "caserver acl token create -description=web -service-identity=web",
    "connect": "caserver connect ca roots",
    "connect ca": "caserver connect ca set-config -config-file=ca.json",
    "connect ca cleanup": "caserver connect ca cleanup list",
    "operator": "caserver operator raft list-peers",
    "operator autopilot": "caserver operator autopilot get-config",
    "operator keyring": "caserver operator keyring status",
    "operator raft": "caserver operator raft list-peers",
    "snapshot": "caserver snapshot save backup.snap",
    "operator recover": "caserver operator recover export -data-dir=/var/lib/caserver",
}


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command; ``arguments`` without the program's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words, os.environ if environ is None else environ)
        sys.stdout.flush()  # here, where a reader that went away is understood
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): no traceback, here or when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return code


def _run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    group, rest = _group(words)
    verb = f"{group} {rest[0]}".strip() if rest else group
    if verb in VERBS:
        return _command(_loaded(verb), rest[1:], environ)
    if rest[:1] in (["-v"], ["-version"], ["--version"]) and not group:
        return _command(_loaded("version"), (), environ)
    wanted = rest[:1] in (["-h"], ["-help"], ["--help"], ["help"])
    (say if wanted else complain)(_group_help(group))
    if wanted:
        return 0
    return EXIT_FAILED if group else EXIT_NO_COMMAND


def _group(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The longest group that ``words`` begin with, and what follows it."""
    for count in range(len(words), 0, -1):
        if " ".join(words[:count]) in GROUPS:
            return " ".join(words[:count]), words[count:]
    return "", words


def _loaded(verb: str) -> Command:
    module, _ = VERBS[verb]
    command: Command = importlib.import_module(f"caserver.cli.{module}").COMMANDS[verb]
    return command


def _command(command: Command, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    try:
        parsed = command.parse(arguments)
    except UsageError as exc:
        complain(f"{exc}\n{_usage(command)}\nFailed to parse args: {exc}")
        return EXIT_FAILED
    if parsed.help_wanted:
        say(command.help())
        return 0
    try:
        return command.run(parsed, environ)
    except UsageError as exc:
        complain(f"{exc}\n{_usage(command)}")
        return EXIT_FAILED
    except ClientError as exc:
        complain(f"{exc}" + (f"\n{exc.remedy[0].upper()}{exc.remedy[1:]}" if exc.remedy else ""))
        return EXIT_FAILED


def _usage(command: Command) -> str:
    return f"Usage: caserver {command.words} {command.usage}".rstrip() + f"\nOptions: caserver {command.words} -h"


def _group_help(group: str) -> str:
    name = f"caserver {group}".strip()
    lines = [f"Usage: {name} <subcommand> [options] [args]", "", f"  {GROUPS[group]}", ""]
    lines += ["  Example:", "", f"      $ {_EXAMPLES[group]}", "", "Subcommands:"]
    inside = {verb.removeprefix(group).strip(): text for verb, (_, text) in VERBS.items() if _within(verb, group)}
    width = max(map(len, inside))
    return "\n".join(lines + [f"    {verb.ljust(width)}    {text}" for verb, text in inside.items()]) + "\n"


def _within(verb: str, group: str) -> bool:
    return not group or verb.startswith(group + " ")
