"""States and commands for tests: small builders, Hypothesis strategies, and the invariants of every state."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import strategies as st

from caserver.internode.keyring import Sealed
from caserver.state.apply import apply
from caserver.state.codec import encode_state
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    BeginChange,
    Bootstrap,
    Command,
    ExpireLeaves,
    IssueLeaves,
    LeafOrder,
    NewRoot,
    ProviderRetired,
    PruneRoots,
    RecordSerials,
    Reseal,
    RestoreAbort,
    RestoreChunk,
    RestoreCommit,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.ledger import by_expiry
from caserver.state.model import HISTORY_MAX, HOUR, CARoot, CAState, Effective, Index, RootID, StoredConfiguration
from caserver.state.restore_apply import NOTHING_YET, next_digest
from caserver.state.sealing import sealed_values
from tests.testkit import acl_states

NOW = 1_800_000_000  # an instant on the hour
CLUSTER_ID = "4a2b8c1e-7c65-4a39-a1b2-0123456789ab"
DAY = 24 * HOUR
YEARS = 10 * 365 * DAY
ROOT_IDS = ("0a:0a", "1b:1b", "2c:2c")
HMAC_KEY = Sealed(b"sealed-hmac-key")


def stored(*, leaf_ttl: int = 72 * HOUR, secret: bytes | None = None, given: str = "{}") -> StoredConfiguration:
    return StoredConfiguration(
        provider="consul",
        given=given,
        secrets=() if secret is None else (("PrivateKey", Sealed(secret)),),
        effective=Effective(leaf_ttl=leaf_ttl),
    )


def new_root(root_id: str = ROOT_IDS[0], *, sealed_key: bytes | None = b"sealed-root-key") -> NewRoot:
    return NewRoot(
        id=RootID(root_id),
        name="Consul CA Root Cert",
        pem=f"-----BEGIN CERTIFICATE-----\n{root_id}\n-----END CERTIFICATE-----\n",
        serial=2**150 + 5,
        not_before=NOW - 300,
        not_after=NOW + YEARS,
        key_type="ec",
        key_bits=256,
        signing_key_id="aa:bb",
        provider="consul",
        intermediates=(),
        sealed_key=None if sealed_key is None else Sealed(sealed_key),
    )


def order(
    name: str = "i1", *, service: str = "web", not_after: int = NOW + 72 * HOUR, serial: int | None = 7
) -> LeafOrder:
    return LeafOrder(issue_id=name, service=service, serial=serial, not_before=NOW - 60, not_after=not_after)


def applied(state: CAState, *commands: Command) -> CAState:
    """The state after ``commands``, each of which must take effect."""
    for command in commands:
        before = state
        state, result = apply(state, command)
        assert state is not before, result
    return state


def bootstrapped(configuration: StoredConfiguration | None = None) -> CAState:
    return applied(CAState(), Bootstrap(NOW, CLUSTER_ID, configuration or stored(), HMAC_KEY))


def rotated(
    state: CAState,
    root_id: str,
    *,
    at: int = NOW,
    configuration: StoredConfiguration | None = None,
    retire_not_before: int | None = None,
    sealed_key: bytes | None = b"sealed-root-key",
) -> CAState:
    """The state after a whole provider change to ``root_id``."""
    assert state.configuration is not None
    request_id = f"to-{root_id}-{state.index}"
    wanted = configuration or state.configuration.stored
    begun = applied(state, BeginChange(request_id, at, state.configuration.modify_index, state.ca_epoch, wanted))
    new = new_root(root_id, sealed_key=sealed_key)
    return applied(begun, ActivateRoot(request_id, at, begun.ca_epoch, new, retire_not_before))


def initialized(*, leaf_ttl: int = 72 * HOUR, max_rows: int = 100_000) -> CAState:
    """A cluster with its first root active."""
    state = rotated(bootstrapped(stored(leaf_ttl=leaf_ttl)), ROOT_IDS[0])
    return replace(state, ledger=replace(state.ledger, max_rows=max_rows))


def issue(state: CAState, *orders: LeafOrder, at: int = NOW) -> IssueLeaves:
    """A batch under the active root."""
    assert state.active_root is not None
    return IssueLeaves(at, state.active_root.id, state.ca_epoch, orders)


# Strategies: values that often mean something (few ids, instants that cross hours and prune dates) and often nothing.

request_ids = st.sampled_from(["", "r1", "r2", "r3", "r4", "r5", "r6"])
root_ids = st.sampled_from([*map(RootID, ROOT_IDS), RootID(""), RootID("ff:ff")])
instants = st.one_of(
    st.integers(NOW - HOUR, NOW + 3 * HOUR), st.integers(NOW, NOW + 30 * DAY), st.sampled_from([0, -1, 2**70])
)
texts = st.sampled_from(["", "web", "db", "a b", "é", "\ud800", 'quo"te', "x" * 70])
seals = st.binary(max_size=8).map(Sealed)
indexes = st.integers(-1, 12).map(Index)
epochs = st.integers(-1, 5)
serials = st.one_of(st.none(), st.integers(-1, 3), st.just(2**159 + 1))
configurations = st.builds(
    StoredConfiguration,
    provider=st.sampled_from(["consul", "vault"]),
    given=st.sampled_from(["{}", '{"LeafCertTTL":"72h"}']),
    secrets=st.sampled_from([(), (("PrivateKey", Sealed(b"s1")),), (("Token", Sealed(b"s2")), ("X", Sealed(b"")))]),
    effective=st.builds(
        Effective,
        leaf_ttl=st.sampled_from([HOUR, 72 * HOUR, -5]),
        csr_max_per_second=st.floats(allow_nan=False, allow_infinity=False),
    ),
    root_cert=st.sampled_from([None, "PEM\n"]),
    force_without_cross_signing=st.booleans(),
)
backends = st.sampled_from([(), (("issuer", "i1"), ("mount", "pki"))])
new_roots = st.builds(
    lambda root_id, serial, key, life, intermediates, backend: replace(
        new_root(root_id, sealed_key=key),
        serial=serial,
        not_after=NOW + life,
        intermediates=intermediates,
        backend=backend,
    ),
    root_ids,
    serials.filter(lambda serial: serial is not None),
    st.one_of(st.none(), st.binary(max_size=8)),
    st.sampled_from([YEARS, HOUR, -HOUR]),
    st.lists(texts, max_size=2).map(tuple),
    backends,
)
orders = st.builds(LeafOrder, texts, texts, serials, instants, instants)
sound_orders = st.builds(
    lambda name, service, life: order(name, service=service, not_after=NOW + life),
    st.sampled_from(["i1", "i2"]),
    st.sampled_from(["web", "db", "api"]),
    st.integers(1, 5 * HOUR),
)


def tuples(of: st.SearchStrategy[object], most: int = 3) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(of, max_size=most).map(tuple)


commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(Bootstrap, instants, st.sampled_from(["", CLUSTER_ID]), configurations, seals),
    st.builds(BeginChange, request_ids, instants, indexes, epochs, configurations, st.booleans(), st.booleans()),
    st.builds(ActivateRoot, request_ids, instants, epochs, new_roots, st.one_of(st.none(), instants)),
    st.builds(SetConfiguration, request_ids, instants, indexes, epochs, configurations),
    st.builds(SetIntermediate, request_ids, instants, epochs, root_ids, tuples(texts), texts, instants, backends),
    st.builds(AbortChange, request_ids, instants, texts, texts, st.one_of(st.none(), instants)),
    st.builds(ProviderRetired, instants, root_ids, epochs, st.sampled_from(["", "r1", "r2"])),
    st.builds(PruneRoots, instants, epochs, tuples(root_ids)),
    st.builds(IssueLeaves, instants, root_ids, epochs, tuples(orders)),
    st.builds(
        RecordSerials,
        instants,
        tuples(st.tuples(st.integers(-1, NOW // HOUR + 3), st.integers(-1, 3), st.integers(-1, 9))),
        indexes,
    ),
    st.builds(ExpireLeaves, instants),
    st.builds(Reseal, instants, indexes, tuples(st.tuples(texts, seals))),
    acl_states.commands,
    st.builds(RestoreChunk, request_ids, instants, st.integers(-1, 3), texts, tuples(texts)),
    st.builds(RestoreCommit, request_ids, instants, st.integers(-1, 3), texts),
    st.builds(RestoreAbort, request_ids, instants),
)
RESTORE_PIECES = 4


def archived() -> CAState:
    """A state of another past, with a leaf and a root on its way out."""
    state = rotated(initialized(leaf_ttl=24 * HOUR), ROOT_IDS[1])
    return applied(state, issue(state, order("archived", service="db", not_after=NOW + 24 * HOUR)))


def pieces_of(state: CAState, count: int = RESTORE_PIECES) -> list[str]:
    """The bytes of a state as text, in as many pieces."""
    text = b"".join(encode_state(state)).decode("ascii")
    size = len(text) // count + 1
    return [text[start : start + size] for start in range(0, len(text), size)]


def restores(state: CAState, *, request_id: str = "restore", at: int = NOW) -> list[Command]:
    """The commands that put ``state`` into the place of another one."""
    digest, found = NOTHING_YET, list[Command]()
    for number, piece in enumerate(pieces_of(state)):
        found.append(RestoreChunk(request_id, at, number, piece, ("aa",)))
        digest = next_digest(digest, piece)
    return [*found, RestoreCommit(request_id, at, len(found), digest)]


def _restoring(state: CAState, at: int) -> Command:
    """The next command of a restore of ``archived``."""
    restoring = state.restoring
    number, request_id = (
        (0, f"restore {state.index}") if restoring is None else (restoring.pieces, restoring.request_id)
    )
    wanted = restores(archived(), request_id=request_id, at=at)
    return wanted[min(number, len(wanted) - 1)]


@st.composite
def fitting(draw: st.DrawFn, state: CAState) -> Command:
    """A command that suits ``state``, so that long sequences get somewhere."""
    at = draw(st.integers(NOW, NOW + 12 * DAY))
    index = state.configuration.modify_index if state.configuration else Index(0)
    request_id = draw(st.sampled_from(["r1", f"at {state.index}"]))
    change_id = state.change.request_id if state.change else request_id
    listed = [root.id for root in state.roots]
    active = state.active_root.id if state.active_root else RootID("")
    places = sorted(sealed_values(state))
    hours = sorted(state.ledger.hours) or [0]
    chosen: st.SearchStrategy[Command] = st.one_of(
        st.builds(Bootstrap, st.just(at), st.just(CLUSTER_ID), configurations, seals),
        st.builds(
            BeginChange,
            st.just(request_id),
            st.just(at),
            st.just(index),
            st.just(state.ca_epoch),
            configurations,
            st.booleans(),
            st.booleans(),
        ),
        st.builds(
            ActivateRoot,
            st.just(change_id),
            st.just(at),
            st.just(state.ca_epoch),
            st.sampled_from(ROOT_IDS).map(new_root),
            st.one_of(st.none(), st.just(at + 10)),
        ),
        st.builds(
            SetConfiguration,
            st.just(request_id),
            st.just(at),
            st.just(index),
            st.just(state.ca_epoch),
            configurations,
        ),
        st.builds(
            SetIntermediate,
            st.just(change_id),
            st.just(at),
            st.just(state.ca_epoch),
            st.just(active),
            tuples(texts),
            texts,
            st.just(at + 10),
            backends,
        ),
        st.builds(AbortChange, st.just(change_id), st.just(at), texts, texts, st.sampled_from([None, at])),
        st.sampled_from([*((each.root_id, each.epoch) for each in state.retiring), (active, state.ca_epoch)]).map(
            lambda owed: ProviderRetired(at, *owed)
        ),
        st.builds(
            PruneRoots,
            st.just(at),
            st.just(state.ca_epoch),
            st.lists(st.sampled_from([*listed, active]), max_size=2).map(tuple),
        ),
        st.builds(IssueLeaves, st.just(at), st.just(active), st.just(state.ca_epoch), tuples(sound_orders, 5)),
        st.builds(
            RecordSerials,
            st.just(at),
            tuples(st.tuples(st.sampled_from(hours), st.integers(0, 6), st.integers(1, 9))),
            st.just(state.restored_index),
        ),
        st.builds(ExpireLeaves, st.just(at)),
        st.just(_restoring(state, at)),
        st.builds(
            Reseal,
            st.just(at),
            st.just(state.roots_index),
            tuples(st.tuples(st.sampled_from([*places, "hmac"]), seals)),
        ),
        acl_states.fitting(state.acl, at, request_id),
    )
    return draw(chosen)


def check_invariants(state: CAState) -> None:
    """What holds of every state, whatever commands led to it."""
    ledger = state.ledger
    assert sum(root.active for root in state.roots) == (1 if state.roots else 0)
    assert [root.id for root in state.roots] == sorted({root.id for root in state.roots})
    assert (state.configuration is None) == (state.cluster_id is None)
    assert state.roots_index <= state.index
    assert state.restored_index <= state.index
    assert state.cluster_id is None or state.founding_id is not None
    assert len(state.history) <= HISTORY_MAX
    assert state.change is None or state.ca_epoch < state.change.epoch == state.epoch_given
    owed = [(each.root_id, each.epoch) for each in state.retiring]
    assert len(owed) == len(set(owed))
    assert all((root.rotated_out_at is None) == root.active for root in state.roots)
    assert ledger.row_count == sum(len(within.rows) for within in ledger.hours.values()) <= ledger.max_rows
    for hour, within in ledger.hours.items():
        assert all(within.first <= number < within.next for number in within.rows)
        assert all(row.not_after // HOUR == hour for row in within.rows.values())
    assert len(ledger.uses) <= ledger.max_rows
    assert ledger.uses_by_expiry == by_expiry(ledger.uses)
    for root in state.roots:
        check_bookkeeping(state, root)
    places = sealed_values(state)
    assert len(places) == _count_secrets(state)
    acl_states.check_invariants(state.acl, state.index)


def check_bookkeeping(state: CAState, root: CARoot) -> None:
    """A root's live leaves by hour are the ledger's, but for rows that its bound pushed out."""
    rows: Counter[int] = Counter()
    for hour, within in state.ledger.hours.items():
        rows[hour] += sum(row.root_id == root.id for row in within.rows.values())
        assert all(row.not_after <= root.leaf_not_after_max for row in within.rows.values() if row.root_id == root.id)
    for hour in rows.keys() | set(root.live_by_hour):
        live, listed = root.live_by_hour.get(hour, 0), rows[hour]
        assert hour in state.ledger.hours
        evicted = state.ledger.hours[hour].first
        assert listed <= live <= listed + evicted


def _count_secrets(state: CAState) -> int:
    holders = [each.configuration for each in state.retiring] + [each.configuration for each in state.history]
    holders += [state.configuration.stored] if state.configuration else []
    holders += [state.change.configuration] if state.change else []
    own = sum(root.sealed_key is not None for root in state.roots) + (state.sealed_hmac_key is not None)
    return own + sum(len(holder.secrets) for holder in holders)
