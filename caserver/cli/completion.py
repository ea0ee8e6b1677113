"""Completion for shells: which words and flags may follow, made from the table of verbs and the flags of each.

The scripts hold no list of their own: they ask ``caserver completion words -- WORD...``, so that they fit whatever version is
installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from caserver.cli.flags import Command, Parsed, Takes, UsageError
from caserver.cli.output import say

_BASH = """\
_caserver() {
    local cur=${COMP_WORDS[COMP_CWORD]} IFS=$'\\n'
    if [ "$cur" = "=" ]; then cur=; fi
    COMPREPLY=($(compgen -W "$(caserver completion words -- "${COMP_WORDS[@]:1:COMP_CWORD-1}" "$cur" 2>/dev/null)" -- "$cur"))
    if [ ${#COMPREPLY[@]} -eq 0 ]; then COMPREPLY=($(compgen -f -- "$cur")); fi
    case ${COMPREPLY[0]-} in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o filenames -F _caserver caserver
"""
_ZSH = """\
#compdef caserver
_caserver() {
    local -a found
    found=(${(f)"$(caserver completion words -- "${words[@]:1:$((CURRENT-2))}" "${words[CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -Q -S '' -- "${found[@]}"; else _files; fi
}
compdef _caserver caserver
"""
_FISH = """\
function __caserver_complete
    set -l words (commandline -opc)
    caserver completion words -- $words[2..-1] (commandline -ct) 2>/dev/null
end
complete -c caserver -f -a '(__caserver_complete)'
complete -c caserver -n 'not count (__caserver_complete) >/dev/null' -F
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_INSTALL = {
    "bash": "caserver completion bash > /etc/bash_completion.d/caserver",
    "zsh": "caserver completion zsh > /usr/local/share/zsh/site-functions/_caserver",
    "fish": "caserver completion fish > ~/.config/fish/completions/caserver.fish",
}


def candidates(words: Sequence[str]) -> list[str]:
    """What may stand in the place of the last of ``words``, sorted; nothing where files or free values go."""
    from caserver.cli import VERBS  # noqa: PLC0415 - the table that this module is part of

    *before, last = words or [""]
    verb = next(
        (" ".join(before[:count]) for count in range(len(before), 0, -1) if " ".join(before[:count]) in VERBS), ""
    )
    if not verb:
        begun = [each for each in before if not each.startswith("-")]
        following = {
            each.split()[len(begun)]
            for each in VERBS
            if each.split()[: len(begun)] == begun and len(each.split()) > len(begun)
        }
        return sorted(each for each in following if each.startswith(last))
    command: Command = importlib.import_module(f"caserver.cli.{VERBS[verb][0]}").COMMANDS[verb]
    flags = [flag for _, group in command.flags for flag in group]
    waiting = before[-1].lstrip("-") if before[-1].startswith("-") and "=" not in before[-1] else ""
    if any(flag.name == waiting and flag.takes is not Takes.NOTHING for flag in flags):
        return []
    if verb == "completion" and not last.startswith("-"):
        return sorted(each for each in _SCRIPTS if each.startswith(last))
    if not last.startswith("-"):
        return []
    dashes = "--" if last.startswith("--") else "-"
    shown = [f"{dashes}{flag.name}" + ("" if flag.takes is Takes.NOTHING else "=") for flag in flags]
    return sorted(each for each in [*shown, f"{dashes}h"] if each.startswith(last))


def _completion(parsed: Parsed, _: Mapping[str, str]) -> int:
    shell, *words = parsed.arguments or [""]
    if shell == "words":
        found = candidates(words)
        if found:
            say("\n".join(found))
        return 0
    if shell not in _SCRIPTS or words:
        raise UsageError(f"name one shell: {', '.join(_SCRIPTS)}")
    say(f"# Install with:  {_INSTALL[shell]}" if shell != "zsh" else _SCRIPTS[shell].splitlines()[0])
    say(_SCRIPTS[shell] if shell != "zsh" else _SCRIPTS[shell].partition("\n")[2])
    return 0


COMMANDS = {
    "completion": Command(
        words="completion",
        usage="bash|zsh|fish",
        description="Prints the completion script of a shell. It asks the installed caserver for words and flags, so it "
        "need not be renewed with it.",
        example=_INSTALL["bash"],
        flags=(),
        run=_completion,
    )
}
