"""Handlers of ``/v1/snapshot``: the whole state as a file, and back."""

from __future__ import annotations

from caserver.api.query import Call, NodeView, Reply, check_datacenter, fresh_state, metadata, reached
from caserver.errors import InvalidRequest

_CONTENT_TYPE = "application/x-gzip"


async def get_snapshot(node: NodeView, call: Call) -> Reply:
    """A snapshot of the state, as fresh as the options ask; made by this node."""
    check_datacenter(node, call.options)
    state = await fresh_state(node, call)
    headers = metadata(node, state.index, stale=call.options.stale)
    return Reply(headers=headers, content_type=_CONTENT_TYPE, pieces=await node.backups.save(state))


async def admit_snapshot(node: NodeView, call: Call) -> None:
    """Whether a snapshot may be restored now, before any of it is read."""
    check_datacenter(node, call.options)
    await node.backups.admit(call.caller(node))


async def put_snapshot(node: NodeView, call: Call) -> Reply:
    """Restore an uploaded snapshot; done on every server once it is done here."""
    if call.upload is None:
        raise InvalidRequest("a snapshot is to be sent as the body")
    await reached(node, await node.backups.restore(call.caller(node), call.upload))
    return Reply()
