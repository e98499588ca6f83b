"""A server that speaks Milvus's protocol over TCP: what it is asked goes on to milvus-lite's own
server (its HNSW too), is recorded, and may be made to fail. It is no cluster."""

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from milvus_lite.server_manager import server_manager_instance
from pymilvus.grpc_gen import milvus_pb2

KINDS = {"CreateIndex": "CreateIndexRequest", "CreateCollection": "CreateCollectionRequest",
         "Search": "SearchRequest", "RenameCollection": "RenameCollectionRequest",
         "DropCollection": "DropCollectionRequest"}  # fmt: skip


class Recorded(grpc.GenericRpcHandler):
    """Every call in order, by name, and its request in bytes.

    Args:
        fails: the call of this name fails, from the time it is set.
        stalls: the call of this name is not answered before the server ends.
    """

    def __init__(self, target: str) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.fails = self.stalls = ""
        self.ended = threading.Event()
        self._channel = grpc.insecure_channel(target.removeprefix("http://"))

    def service(self, details: Any) -> Any:
        name = details.method.rsplit("/", 1)[1]
        forward = self._channel.unary_unary(details.method)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((name, request))
            if name == self.stalls:
                self.ended.wait(60)
            if name == self.fails:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the disk\nis full")
            try:
                return forward(request, metadata=context.invocation_metadata())
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
                raise

        return grpc.unary_unary_rpc_method_handler(answer)

    def asked(self, name: str) -> list[Any]:
        """The requests of all calls of a name."""
        kind = getattr(milvus_pb2, KINDS[name])
        return [kind.FromString(request) for called, request in self.calls if called == name]


@contextmanager
def serving(directory: Path) -> Iterator[tuple[str, Recorded]]:
    """Its address, and what it records, while the block runs."""
    behind = server_manager_instance.start_and_get_uri(str(directory / "server.db"))
    recorded = Recorded(behind)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((recorded,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", recorded
    finally:
        recorded.ended.set()
        server.stop(grace=0).wait()
        server_manager_instance.release_server(str(directory / "server.db"))
