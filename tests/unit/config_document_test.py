from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.config import document
from caserver.config.document import Document, parse_hcl, parse_json

PEM = "-----BEGIN CERTIFICATE-----\nMIIB+/==\nAAAA\n-----END CERTIFICATE-----\n"


def values_of(text: str) -> object:
    read = parse_hcl("x.hcl", text)

    assert read.faults == ()
    return read.values


def faults_of(text: str, parse: Callable[[str, str], Document] = parse_hcl) -> list[str]:
    return [str(fault) for fault in parse("x", text).faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a = "text"', {"a": "text"}),
        ("a = 5\nb = -5\nc = 1.5\nd = -1.5e3\ne = -12", {"a": 5, "b": -5, "c": 1.5, "d": -1500.0, "e": -12}),
        ("a = true\nb = false\nc = null", {"a": True, "b": False, "c": None}),
        ('a = ["x", 1, [true],]', {"a": ["x", 1, [True]]}),
        ('a { b = "c" }', {"a": {"b": "c"}}),
        ('a = { b = "c" }', {"a": {"b": "c"}}),
        ('a = { "b" : "c", d = 1 }', {"a": {"b": "c", "d": 1}}),
        ('a { b = 1 c = "one line, as Consul allows" }', {"a": {"b": 1, "c": "one line, as Consul allows"}}),
        ("a { b { c = 1 } }", {"a": {"b": {"c": 1}}}),
        ("a { }\nb = {}", {"a": {}, "b": {}}),
        ('peer "n1" { x = 1 }\npeer "n2" { x = 2 }', {"peer": {"n1": {"x": 1}, "n2": {"x": 2}}}),
        ("a { b = 1 }\na { c = 2 }", {"a": {"b": 1, "c": 2}}),
        ("# note\n// note\n/* note */\na = 1 # note", {"a": 1}),
        ('a = "http://x # y"', {"a": "http://x # y"}),
        ('a = "  kept  "\nb = " "\nc = ""', {"a": "  kept  ", "b": " ", "c": ""}),
        ('a = "<<EOF"', {"a": "<<EOF"}),
        (r'a = "\"q\" \\ \n \t \u00e9 \U0001F600"', {"a": '"q" \\ \n \t é 😀'}),
        ('a = "$${b} %%{c}"', {"a": "${b} %{c}"}),
        ("a = (5)", {"a": 5}),
        ("true = 1", {"true": 1}),
        ("", {}),
    ],
)
def test_hcl_arrives_as_plain_values(text: str, expected: object) -> None:
    assert values_of(text) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_pem_in_a_heredoc_arrives_byte_for_byte(newline: str) -> None:
    pem = PEM.replace("\n", newline)

    assert values_of(f"a = <<EOF{newline}{pem}EOF{newline}b = 1{newline}") == {"a": pem, "b": 1}


@pytest.mark.parametrize("indent", ["", "  ", "\t", "      "])
@pytest.mark.parametrize("before_marker", ["", "    "])
def test_a_pem_in_an_indented_heredoc_arrives_byte_for_byte(indent: str, before_marker: str) -> None:
    lines = "".join(indent + line for line in PEM.splitlines(keepends=True))

    assert values_of(f"a {{\n  b = <<-EOF\n{lines}{before_marker}EOF\n}}\n") == {"a": {"b": PEM}}


def test_an_indented_heredoc_keeps_what_is_indented_further_and_blank_lines() -> None:
    assert values_of("a = <<-EOF\n    x\n\n      y\n    EOF\n") == {"a": "x\n\n  y\n"}


def test_a_heredoc_is_not_interpreted() -> None:
    assert values_of('a = <<EOF\n${x} \\n "q"\nEOF\n') == {"a": '${x} \\n "q"\n'}


def test_an_empty_heredoc_is_an_empty_text() -> None:
    assert values_of("a = <<EOF\nEOF\n") == {"a": ""}


@given(
    st.lists(
        st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)).filter(lambda line: line.strip() != "EOF"),
        min_size=1,
    )
)
def test_any_lines_survive_a_heredoc(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)

    assert values_of(f"a = <<EOF\n{text}EOF\n") == {"a": text}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_quoted_string(text: str) -> None:
    escaped = "".join(f"\\U{ord(char):08x}" if not char.isalnum() else char for char in text)

    assert values_of(f'a = "{escaped}"') == {"a": text}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a = 1\na = 2", "x:2: a: given twice (first on line 1); keep one of them"),
        ("a { b = 1 }\na { b = 2 }", "x:2: a.b: given twice (first on line 1); keep one of them"),
        ('p "n" { }\np "n" { }', "x:2: p.n: given twice (first on line 1); keep one of them"),
        ("a = 1\na { b = 2 }", "x:2: a: given twice (first on line 1); keep one of them"),
        ('a = 1\na "b" { }', "x:2: a: given twice (first on line 1); keep one of them"),
        ("a = { b = 1, b = 2 }", "x:1: a.b: given twice (first on line 1); keep one of them"),
        ("a = b", "x:1: a: a word without quotes is a reference, and references are not evaluated; put it in quotes"),
        ("a = 1 + 2", "x:1: a: expressions are not evaluated; write the value itself"),
        ('a = file("x")', "x:1: a: expressions are not evaluated; write the value itself"),
        ('a = "${b}"', "x:1: a: interpolation is not evaluated; write $${ for the characters ${"),
        ('a = "x\ny"', "x:1: a: a quoted string must end on its line; use \\n, or a heredoc (<<EOF)"),
        (r'a = "\q"', "x:1: a: a backslash starts no known escape; write \\\\ for a backslash"),
        (r'a = "\ud800"', "x:1: a: a backslash starts no known escape; write \\\\ for a backslash"),
        ("a = 9999999999999999999999", "x:1: a: expressions are not evaluated; write the value itself"),
        ("a {\n b = 1\n", 'x:3:1: unexpected end of file, expected "}"; check quotes, braces and line ends up to here'),
        ('{"a": 1}', "x:1:1: unexpected text, expected a name or end of line; a JSON file must be named *.json"),
    ],
)
def test_hcl_faults_name_place_and_remedy(text: str, fault: str) -> None:
    assert fault in faults_of(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "a": 2}', 'x: the key "a" is given twice in one object; keep one of them'),
        ('{"a": {"b": 1, "b": 1}}', 'x: the key "b" is given twice in one object; keep one of them'),
        ('{"a": ', "x:1:7: unexpected end of JSON input; check quotes, commas and braces up to here"),
        ('{"a": "x', "x:1:7: unexpected end of JSON input; check quotes, commas and braces up to here"),
        ('{"a" 1}', "x:1:6: invalid JSON: Expecting ':' delimiter; check quotes, commas and braces up to here"),
        ('{"a": NaN}', "x: a number cannot be read; write it with at most 18 digits; NaN and Infinity are none"),
        ("[1]", "x: not a JSON object; write { ... }"),
        ("[" * 200_000, "x: nested too deeply; a configuration has a few levels only"),
    ],
)
def test_json_faults_name_place_and_remedy(text: str, fault: str) -> None:
    assert fault in faults_of(text, parse_json)


@given(st.text(max_size=60) | st.text('a={}"\n<E[],1 -$%#\\', max_size=40))
def test_no_text_makes_the_readers_raise(text: str) -> None:
    assert parse_hcl("x", text) is not None
    assert parse_json("x", text) is not None


def test_a_syntax_fault_does_not_quote_the_text_around_it() -> None:
    text = 'private_key = "-----BEGIN PRIVATE KEY-----hunter2" hunter2 "hunter2'

    assert "hunter2" not in "".join(faults_of(text) + faults_of(text, parse_json))


def test_a_document_does_not_show_its_values() -> None:
    assert "hunter2" not in repr(parse_hcl("x", 'cluster_secret = "hunter2"'))


def test_keys_know_their_lines() -> None:
    read = parse_hcl("x", "a = 1\nb {\n  c = 2\n}\n")

    assert read.lines == {("a",): 1, ("b",): 2, ("b", "c"): 3}


def test_the_file_name_decides_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "b.hcl").write_text("\ufeffa = 2", encoding="utf-8")
    (tmp_path / "c.conf").write_text("a = 3")

    read = [document.read(each) for each in sorted(tmp_path.iterdir())]

    assert [each.values for each in read] == [{"a": 1}, {"a": 2}, {}]
    assert str(read[2].faults[0]).endswith("the name does not say which format it has; name the file *.hcl or *.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff", "not UTF-8 text"),
        (b" " * (document.MAX_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_an_unreadable_file_is_a_fault(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "x.hcl"
    if content is not None:
        path.write_bytes(content)

    assert problem in str(document.read(path).faults[0])


def test_a_directory_yields_its_configuration_files_in_order(tmp_path: Path) -> None:
    for name in ("b.json", "a.hcl", "z.txt"):
        (tmp_path / name).touch()
    (tmp_path / "dir.hcl").mkdir()

    assert [path.name for path in document.files_of(tmp_path)] == ["a.hcl", "b.json"]


def test_keys_may_be_quoted_as_consul_takes_them() -> None:
    text = """
    "datacenter" = "dc1"
    http_config {
      "response_headers" { "X-Site" = "a" "*" = "b" }
    }
    "ports" = { "http" = 1 }
    # "not" = "a key"
    list = [
      "a",
      "b" ]
    peer "n1" { "address" = "x" }
    text = <<EOF
"inside" = "a heredoc"
EOF
    """

    found = parse_hcl("x", text)

    assert found.faults == ()
    assert found.values == {
        "datacenter": "dc1",
        "http_config": {"response_headers": {"X-Site": "a", "*": "b"}},
        "ports": {"http": 1},
        "list": ["a", "b"],
        "peer": {"n1": {"address": "x"}},
        "text": '"inside" = "a heredoc"\n',
    }
    assert found.lines["datacenter",] == 2
    assert found.lines["peer", "n1", "address"] == 11


def test_a_key_is_the_same_with_and_without_quotes() -> None:
    (fault,) = parse_hcl("x", 'a = 1\n"a" = 2').faults

    assert str(fault) == "x:2: a: given twice (first on line 1); keep one of them"


def test_blocks_that_consul_takes_several_times_are_a_list() -> None:
    text = 'service {\n name = "a"\n check { id = 1 }\n check { id = 2 }\n}\nservice { name = "b" }'

    found = parse_hcl("x", text)

    assert found.faults == ()
    assert found.values == {"service": [{"name": "a", "check": [{"id": 1}, {"id": 2}]}, {"name": "b"}]}


@pytest.mark.parametrize("key", ["q_", "q_61", "q_zz", "q_ff", "qq_61"])
def test_a_key_is_what_it_says_whatever_quoted_ones_are_turned_into(key: str) -> None:
    found = parse_hcl("x", f'{key} = 1\n"X-Site" = 2\nt {{\n  "{key}a" = 3\n}}\n')

    assert not found.faults
    assert found.values == {key: 1, "X-Site": 2, "t": {f"{key}a": 3}}


@pytest.mark.parametrize(
    "text",
    [
        'a { b = 1, c = [1, 2], d = { e = 1, f = "x, y" }, g { h = true, "i j" = "k" } }',
        'a {\n  b = 1,\n  c = [1, 2,],\n  d = { e = 1, f = "x, y" },\n  g { h = true, "i j" = "k", },\n}\n',
        'a { b = 1 # one, two\n c = [1, 2], d = { e = 1, f = "x, y" } /* , */, g { "h" = true, "i j" = "k" } }',
    ],
)
def test_statements_may_be_separated_by_commas(text: str) -> None:
    """As in HCL 1, which Consul reads."""
    read = document.parse_hcl("f", text)

    assert not read.faults
    assert read.values == {"a": {"b": 1, "c": [1, 2], "d": {"e": 1, "f": "x, y"}, "g": {"h": True, "i j": "k"}}}


@pytest.mark.parametrize(
    "text",
    [
        'a = { b = true, c { d = "e" } }',
        'a = {\n b = true\n c {\n  "d" = "e"\n }\n}',
        'a = { b = true "c" { d = "e" } }',
    ],
)
def test_a_block_may_stand_in_an_object(text: str) -> None:
    read = document.parse_hcl("f", text)

    assert not read.faults
    assert read.values == {"a": {"b": True, "c": {"d": "e"}}}


def test_a_comma_of_a_heredoc_is_its_own() -> None:
    read = document.parse_hcl("f", 'a { b = <<EOF\nx, { y,\nEOF\n c = "}, {" , d = 1 }, e = 2')

    assert not read.faults
    assert read.values == {"a": {"b": "x, { y,\n", "c": "}, {", "d": 1}, "e": 2}


@pytest.mark.parametrize("comment", ["# one, {\n", "// two }\n", '/* three "\n */ ', "# four\n# five\n" + " " * 1000])
def test_a_comment_before_an_object_is_no_name_of_a_block(comment: str) -> None:
    read = document.parse_hcl("f", f"a {{ b = [\n{comment}{{ c = 1, d = 2 }},\n{comment}{{ c = 3 }}\n] }}\n")

    assert not read.faults
    assert read.values == {"a": {"b": [{"c": 1, "d": 2}, {"c": 3}]}}
