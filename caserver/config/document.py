"""Configuration documents: HCL and JSON files as plain nested mappings, with the line of every key.

The one place that knows python-hcl2. Its dictionary output keeps quotes and raw heredocs, drops the first of two equal
keys and writes expressions as strings, so this reads its syntax tree instead: strings arrive unescaped, a heredoc byte for byte
(with the newline that ends its last line, as in Consul), ``key { }`` and ``key = { }`` alike as mappings, labelled
blocks as nested mappings. What would have to be evaluated (references, functions, interpolation) is refused.

A parser's own message may quote the text around a fault, and that text may be a key: messages here are built from
positions and token names only.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from caserver.fields import Fault

KeyPath = tuple[str, ...]

MAX_BYTES = 1 << 20  # a configuration file is some kilobytes; what is larger is something else
_DIGITS_MAX = 18  # no setting needs more, and int() of thousands of digits raises

_SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
# Heredocs, comments and strings are left as they are.
_TEXTS = r"""
    <<-?(?P<mark>[A-Za-z][\w.-]*)\r?\n(?:.*\n)*?[ \t]*(?P=mark)(?=\r?\n|\Z)
    | \#.* | //.* | /\*(?:.|\n)*?\*/"""
_STRING = r"""| "(?:[^"\\]|\\.)*" """
# Quoted keys at the beginning of a statement.
_STATEMENTS = re.compile(
    _TEXTS
    + r"""| (?P<before>(?:\A|(?<=[\n{}"\],]))[ \t]*)"(?P<key>[^"\\\n$%]+)"(?P<after>[ \t]*(?:=(?!=)|\{))"""
    + _STRING,
    re.VERBOSE,
)
_PUNCTUATION = re.compile(_TEXTS + _STRING + r"| (?P<sign>[][(){},])", re.VERBOSE)
_COMMENTS = ("#", "/")
_EXPRESSION_BEFORE = "=:,[({"  # what stands before the brace of an object; that of a block follows a name
# Blocks that Consul takes several times in one file.
_LISTED = {"check", "service", "watches"}
_SURROGATES = range(0xD800, 0xE000)
_TOKEN_NAMES = {
    "$END": "end of file",
    "RBRACE": '"}"',
    "LBRACE": '"{"',
    "RSQB": '"]"',
    "LSQB": '"["',
    "EQ": '"="',
    "COLON": '":"',
    "COMMA": '","',
    "DBLQUOTE": "a quote",
    "NL_OR_COMMENT": "end of line",
    "NAME": "a name",
    "STRING_CHARS": "text",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One file, read; with faults the values are what could be understood."""

    name: str  # the path as the operator gave it
    values: Mapping[str, object] = field(default_factory=dict, repr=False)  # may hold keys and secrets
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)  # line of each key; empty for JSON
    faults: tuple[Fault, ...] = ()


def read(path: Path, *, file_format: str | None = None) -> Document:
    """Read one file, by its name HCL or JSON unless ``file_format`` says which; every failure is a fault of the document."""
    name, written_in = str(path), f".{file_format}" if file_format else path.suffix
    if written_in not in (".hcl", ".json"):
        return _failed(name, "the name does not say which format it has", "name the file *.hcl or *.json")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _failed(name, "not UTF-8 text", "save it as UTF-8")
    except OSError as exc:
        return _failed(name, f"cannot be read ({os.strerror(exc.errno or 0)})", "check the path and its permissions")
    if len(raw) > MAX_BYTES:
        return _failed(name, "larger than 1 MiB", "check that this is the configuration file")
    return parse_json(name, text) if written_in == ".json" else parse_hcl(name, text)


def files_of(directory: Path, *, of_any_name: bool = False) -> tuple[Path, ...]:
    """The ``*.hcl`` and ``*.json`` files directly in ``directory``, sorted by name; OSError if it cannot be listed."""
    files = (each for each in directory.iterdir() if each.is_file())
    return tuple(sorted(each for each in files if of_any_name or each.suffix in (".hcl", ".json")))


def parse_json(name: str, text: str) -> Document:
    """Read JSON text: one object, no key twice, no NaN."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                repeated.append(key)
            found[key] = value
        return found

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as exc:
        ended = exc.pos >= len(text.rstrip()) or exc.msg.startswith("Unterminated string")
        problem = "unexpected end of JSON input" if ended else f"invalid JSON: {exc.msg}"
        return _failed(f"{name}:{exc.lineno}:{exc.colno}", problem, "check quotes, commas and braces up to here", name)
    except ValueError:
        return _failed(name, "a number cannot be read", "write it with at most 18 digits; NaN and Infinity are none")
    except RecursionError:
        return _failed(name, "nested too deeply", "a configuration has a few levels only")
    if not isinstance(values, dict):
        return _failed(name, "not a JSON object", "write { ... }")
    faults = tuple(Fault(name, f'the key "{key}" is given twice in one object', "keep one of them") for key in repeated)
    return Document(name, values, {}, faults)


def parse_hcl(name: str, text: str) -> Document:
    """Read HCL text."""
    # The grammar takes 90 ms to load: client commands must not pay for it.
    import hcl2  # noqa: PLC0415
    from lark.exceptions import LarkError, UnexpectedInput, UnexpectedToken  # noqa: PLC0415

    try:
        mark = _mark(text)
        tree = hcl2.parses_to_tree(_as_hcl2(_unquoted_keys(text, mark)))
        reader = _Hcl(name, mark)
        values = reader.body(tree.children[0], ())
    except UnexpectedToken as exc:
        where = f"{name}:{exc.line}:{exc.column}"
        return _failed(where, _unexpected(exc.token.type, exc.expected), _syntax_remedy(text), name)
    except UnexpectedInput as exc:
        return _failed(f"{name}:{exc.line}:{exc.column}", "unexpected character", _syntax_remedy(text), name)
    except LarkError:
        return _failed(name, "not valid HCL", _syntax_remedy(text))
    except RecursionError:
        return _failed(name, "nested too deeply", "a configuration has a few levels only")
    return Document(name, values, reader.lines, tuple(reader.faults))


def _mark(text: str) -> str:
    """What no name in ``text`` begins with."""
    return "q" * (1 + max(map(len, re.findall("q+", text)), default=0)) + "_"


def _unquoted_keys(text: str, mark: str) -> str:
    """HCL whose keys are not quoted, as HCL 2 wants it and HCL 1, which Consul reads, does not insist on.

    ``"X-Site" = "a"`` and ``"service" { }`` at the beginning of a statement: such a key becomes ``mark`` and its bytes in
    hexadecimal, a name that HCL 2 takes where it takes no quotes. Lines stay where they are.
    """

    def replace(found: re.Match[str]) -> str:
        key = found["key"]
        if key is None:
            return found[0]
        return found["before"] + mark + key.encode("utf-8", "surrogatepass").hex() + found["after"]

    return _STATEMENTS.sub(replace, text)


def _as_hcl2(text: str) -> str:
    """HCL without what HCL 1 takes and HCL 2 does not: commas between statements, and blocks within an object.

    Lines stay where they are.
    """
    within: list[bool] = []  # whether each open bracket is that of a block
    last, seen = "", 0  # the last character that means something, of the text up to there

    def replace(found: re.Match[str]) -> str:
        nonlocal last, seen
        sign, before = found["sign"], text[seen : found.start()].rstrip()[-1:] or last
        seen, last = found.end(), before if found[0].startswith(_COMMENTS) else found[0][-1]
        if sign is None:
            return found[0]
        in_block = not within or within[-1]
        if sign == "," and in_block:
            return " "
        if sign in "[({":
            follows_name = sign == "{" and before not in _EXPRESSION_BEFORE
            within.append(in_block and follows_name)
            if follows_name and not in_block:
                return "= {"
        elif sign != "," and within:
            within.pop()
        return sign

    return _PUNCTUATION.sub(replace, text)


def _failed(where: str, problem: str, remedy: str, name: str = "") -> Document:
    return Document(name or where, faults=(Fault(where, problem, remedy),))


def _unexpected(token: str, expected: set[str]) -> str:
    problem = f"unexpected {_TOKEN_NAMES.get(token, token)}"
    if 0 < len(expected) <= 2:  # noqa: PLR2004 - a longer list says nothing
        problem += ", expected " + " or ".join(sorted(_TOKEN_NAMES.get(each, each) for each in expected))
    return problem


def _syntax_remedy(text: str) -> str:
    if text.lstrip().startswith("{"):
        return "a JSON file must be named *.json"
    return "check quotes, braces and line ends up to here"


class _Hcl:
    """One walk over a syntax tree."""

    def __init__(self, document: str, mark: str) -> None:
        self._document, self._mark = document, mark
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[Fault] = []
        self._blocks: set[KeyPath] = set()

    def body(self, tree: object, path: KeyPath) -> dict[str, object]:
        """Attributes and blocks of a file or block."""
        found: dict[str, object] = {}
        self._fill(found, tree, path)
        return found

    def _fill(self, target: dict[str, object], tree: object, path: KeyPath) -> None:
        for child in _trees(tree):
            if _rule(child) == "attribute":
                name, expression = _trees(child)
                key = self._name(name)
                self._put(target, (*path, key), self._value(expression, (*path, key)), _line(child))
            elif _rule(child) == "block":
                self._block(target, child, path)

    def _block(self, target: dict[str, object], tree: object, path: KeyPath) -> None:
        *names, body = _content(tree)
        labels = [self._name(names[0]), *(self._label(each) for each in names[1:])]
        if labels[0] in _LISTED and len(labels) == 1:
            self._listed(target, body, (*path, labels[0]))
            return
        for label in labels[:-1]:
            path = (*path, label)
            inner = target.setdefault(label, {})
            self.lines.setdefault(path, _line(tree))
            if not isinstance(inner, dict):
                self._twice(path, _line(tree))
                return
            target = inner
        path = (*path, labels[-1])
        existing = target.get(labels[-1])
        # Consul merges unlabelled blocks of one name; two blocks with the same label are a copy-and-paste mistake.
        if isinstance(existing, dict) and path in self._blocks and len(labels) == 1:
            self._fill(existing, body, path)
            return
        self._blocks.add(path)
        self._put(target, path, self.body(body, path), _line(tree))

    def _listed(self, target: dict[str, object], body: object, path: KeyPath) -> None:
        found = target.setdefault(path[-1], [])
        self.lines.setdefault(path, _line(body))
        if isinstance(found, list):
            found.append(self.body(body, path))
        else:
            self._twice(path, _line(body))

    def _put(self, target: dict[str, object], path: KeyPath, value: object, line: int) -> None:
        if path[-1] in target:
            self._twice(path, line)
            return
        target[path[-1]] = value
        self.lines[path] = line

    def _twice(self, path: KeyPath, line: int) -> None:
        first = self.lines.get(path)
        self._fault(line, path, f"given twice (first on line {first})", "keep one of them")

    def _label(self, tree: object) -> str:
        return self._string(tree, ()) if _rule(tree) == "string" else self._name(tree)

    def _name(self, tree: object) -> str:
        word = _word(tree)
        if not word.startswith(self._mark):
            return word
        return bytes.fromhex(word.removeprefix(self._mark)).decode("utf-8", "surrogatepass")

    def _value(self, tree: object, path: KeyPath) -> object:
        match _rule(tree):
            case "expr_term":
                inner = _content(tree)
                return self._value(inner[0], path) if len(inner) == 1 else self._computed(tree, path)
            case "int_lit" | "float_lit" | "unary_op":
                return self._number(tree, path)
            case "literal_value":
                return {"true": True, "false": False}.get(_word(tree))
            case "string" | "heredoc_template" | "heredoc_template_trim":
                return self._text(tree, path)
            case "tuple":
                return [self._value(each, path) for each in _content(tree)]
            case "object":
                return self._object(tree, path)
            case _:
                return self._computed(tree, path)

    def _text(self, tree: object, path: KeyPath) -> str:
        if _rule(tree) == "string":
            return self._string(tree, path)
        return _heredoc(_word(tree), trim=_rule(tree) == "heredoc_template_trim")

    def _object(self, tree: object, path: KeyPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for element in _trees(tree):
            if _rule(element) != "object_elem":
                continue
            name, expression = _trees(element)
            key = self._key(name, path)
            self._put(found, (*path, key), self._value(expression, (*path, key)), _line(element))
        return found

    def _key(self, tree: object, path: KeyPath) -> str:
        inner = _trees(tree)[0]
        if _rule(inner) == "expr_term":
            inner = _trees(inner)[0]
        match _rule(inner):
            case "string":
                return self._string(inner, path)
            case "identifier" | "keyword" | "literal_value" | "int_lit":
                return self._name(inner)
            case _:
                self._computed(inner, path)
                return ""

    def _number(self, tree: object, path: KeyPath) -> object:
        text = "".join(str(token) for token in _tokens(tree)).replace(" ", "")
        if re.fullmatch(rf"-?[0-9]{{1,{_DIGITS_MAX}}}", text):
            return int(text)
        if re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?", text):
            return float(text)
        return self._computed(tree, path)

    def _string(self, tree: object, path: KeyPath) -> str:
        return "".join(self._part(part, path) for part in _trees(tree))

    def _part(self, part: object, path: KeyPath) -> str:
        content = next(iter(getattr(part, "children", ())))
        kind, text = getattr(content, "type", ""), str(content)
        if kind in ("ESCAPED_INTERPOLATION", "ESCAPED_DIRECTIVE"):
            return text[1:]
        if kind != "STRING_CHARS":
            self._fault(_line(part), path, "interpolation is not evaluated", "write $${ for the characters ${")
            return ""
        if "\n" in text:
            self._fault(_line(part), path, "a quoted string must end on its line", "use \\n, or a heredoc (<<EOF)")
            return ""
        return _ESCAPE.sub(lambda match: self._escape(match, part, path), text)

    def _escape(self, match: re.Match[str], part: object, path: KeyPath) -> str:
        short, long, simple = match.groups()
        if simple is None:
            codepoint = int(short or long, 16)
            if codepoint <= sys.maxunicode and codepoint not in _SURROGATES:
                return chr(codepoint)
        elif simple in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[simple]
        self._fault(_line(part), path, "a backslash starts no known escape", "write \\\\ for a backslash")
        return ""

    def _computed(self, tree: object, path: KeyPath) -> object:
        if _rule(tree) == "identifier":
            problem, remedy = (
                "a word without quotes is a reference, and references are not evaluated",
                "put it in quotes",
            )
        else:
            problem, remedy = "expressions are not evaluated", "write the value itself"
        self._fault(_line(tree), path, problem, remedy)
        return None

    def _fault(self, line: int, path: KeyPath, problem: str, remedy: str) -> None:
        where = f"{self._document}:{line}"
        self.faults.append(Fault(f"{where}: {'.'.join(path)}" if path else where, problem, remedy))


def _heredoc(token: str, *, trim: bool) -> str:
    """The lines between the markers; ``trim`` (``<<-``) removes the indentation that all of them share."""
    _, _, rest = token.partition("\n")
    content = rest.rstrip("\r\n")
    content = content[: content.rfind("\n") + 1]
    if not trim:
        return content
    lines = content.split("\n")
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line.strip()]
    shortest, longest = min(indents, default=""), max(indents, default="")
    differ = (at for at, (one, other) in enumerate(zip(shortest, longest, strict=False)) if one != other)
    shared = next(differ, len(shortest))
    return "\n".join(line[shared:] for line in lines)


def _rule(tree: object) -> str:
    return str(getattr(tree, "data", ""))


def _trees(tree: object) -> list[object]:
    return [child for child in getattr(tree, "children", ()) if hasattr(child, "data")]


def _content(tree: object) -> list[object]:
    return [child for child in _trees(tree) if _rule(child) != "new_line_or_comment"]


def _tokens(tree: object) -> Iterator[object]:
    for child in getattr(tree, "children", ()):
        if hasattr(child, "data"):
            yield from _tokens(child)
        else:
            yield child


def _word(tree: object) -> str:
    return str(next(iter(getattr(tree, "children", ("",)))))


def _line(tree: object) -> int:
    return int(getattr(getattr(tree, "meta", None), "line", 0))
