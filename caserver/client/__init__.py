"""Client of the public HTTP API; loads neither the Raft engine nor an HTTP server."""

from caserver.client.client import Answer, Client, ClientError, ClientSettings, ConnectionFailed, UnexpectedResponse

__all__ = ["Answer", "Client", "ClientError", "ClientSettings", "ConnectionFailed", "UnexpectedResponse"]
