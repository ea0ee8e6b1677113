import json
from typing import Any

import pytest

from caserver.errors import Corrupt
from caserver.internode.membership import HELLO_BYTES_MAX, PROTOCOL, Hello, Membership, names_digest

NAMES = ("n1", "n2", "n3")
CLUSTER, OTHER = "11111111-0000-4000-8000-000000000000", "22222222-0000-4000-8000-000000000000"


def fields(**changes: Any) -> bytes:
    given = json.loads(Membership(NAMES).hello("n2", to="n1").encode())
    return json.dumps({key: value for key, value in (given | changes).items() if value != "absent"}).encode()


class TestNamesDigest:
    def test_order_and_repetition_do_not_matter(self) -> None:
        assert names_digest(["n2", "n1", "n2"]) == names_digest(("n1", "n2"))

    @pytest.mark.parametrize("others", [("n1",), ("n1", "n2", "n3"), ("n1n2",), ('n1","n2',), ("n1, n2",)])
    def test_other_names_have_another_digest(self, others: tuple[str, ...]) -> None:
        assert names_digest(others) != names_digest(("n1", "n2"))


class TestHello:
    def test_it_arrives_as_it_was_said(self) -> None:
        for cluster_id in (None, CLUSTER):
            hello = Membership(NAMES, "1:ab", cluster_id=cluster_id).hello("n1", to="n2")

            assert Hello.decode(hello.encode()) == hello
            assert len(hello.encode()) < HELLO_BYTES_MAX

    def test_fields_of_later_releases_are_ignored(self) -> None:
        assert Hello.decode(fields(colour="blue")) == Membership(NAMES).hello("n2", to="n1")

    def test_a_node_of_the_first_release_reads_no_later_kinds(self) -> None:
        assert Hello.decode(fields(kinds="absent")).kinds == ()

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 100_000,
            fields(protocol="1"),
            fields(protocol=True),
            fields(protocol="absent"),
            fields(node="absent"),
            fields(node=""),
            fields(to=3),
            fields(names=None),
            fields(names="x" * 1000),
            fields(generation=0),
            fields(cluster_id=[]),
            fields(kinds="keys"),
            fields(kinds=[1]),
            fields(kinds=["x"] * 1000),
        ],
    )
    def test_anything_else_is_refused(self, payload: bytes) -> None:
        with pytest.raises(ValueError):
            Hello.decode(payload)


class TestCheck:
    def check(self, ours: Membership, theirs: Membership) -> str | None:
        return ours.check(theirs.hello("n2", to="n1"))

    def test_nodes_of_one_cluster_belong_together_in_any_order_of_names(self) -> None:
        assert self.check(Membership(NAMES), Membership(tuple(reversed(NAMES)))) is None

    def test_a_cluster_id_that_one_does_not_know_yet_is_no_difference(self) -> None:
        known, unknown = Membership(NAMES, cluster_id=CLUSTER), Membership(NAMES)

        assert self.check(known, unknown) is None
        assert self.check(unknown, known) is None

    @pytest.mark.parametrize(
        ("theirs", "words"),
        [
            (Membership(("n1", "n2")), "`caserver operator recover`"),
            (Membership(NAMES, "1:ab"), "generation 1:ab, this node of generation 0"),
            (Membership(NAMES, cluster_id=OTHER), f"cluster {OTHER}, this node to cluster {CLUSTER}"),
        ],
    )
    def test_what_differs_is_refused_on_both_sides_with_a_remedy(self, theirs: Membership, words: str) -> None:
        ours = Membership(NAMES, cluster_id=CLUSTER)

        assert words in (self.check(ours, theirs) or "")
        assert self.check(theirs, ours) is not None

    def test_another_protocol_is_refused(self) -> None:
        hello = Hello.decode(fields(protocol=PROTOCOL + 1))

        assert "same release" in (Membership(NAMES).check(hello) or "")


class TestAdopt:
    def test_the_first_cluster_id_is_taken_and_kept(self) -> None:
        membership = Membership(NAMES)
        membership.adopt(CLUSTER)
        membership.adopt(CLUSTER)

        assert membership.hello("n1", to="n2").cluster_id == CLUSTER
        with pytest.raises(Corrupt, match="two clusters share"):
            membership.adopt(OTHER)


class TestMeet:
    def test_a_learner_takes_on_the_first_generation_that_it_meets(self) -> None:
        learned: list[str] = []
        learner = Membership(NAMES, None, learned=learned.append)
        for generation in (None, "2:ab", "3:cd"):
            learner.meet(Membership(NAMES, generation).hello("n2", to="n1"))

        assert (learner.generation, learned) == ("2:ab", ["2:ab"])
        assert learner.check(Membership(NAMES, "3:cd").hello("n2", to="n1")) is not None

    def test_a_node_that_has_a_generation_keeps_it(self) -> None:
        membership = Membership(NAMES)
        membership.meet(Membership(NAMES, None).hello("n2", to="n1"))

        assert membership.generation == "0"

    def test_a_generation_that_cannot_be_stored_is_not_taken_on(self) -> None:
        def fail(generation: str) -> None:
            raise OSError(generation)

        learner = Membership(NAMES, None, learned=fail)
        with pytest.raises(OSError):
            learner.meet(Membership(NAMES, "2:ab").hello("n2", to="n1"))

        assert learner.generation is None
