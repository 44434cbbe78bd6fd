"""Messages between a process and the ranks that it started: plain values, tensors without a copy.

A message is pickled with its tensors' memory left out; that memory follows, piece by piece, from
where it lies, so that a rank near its limit needs no room for a second copy.
"""

from __future__ import annotations

import math
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch


def send(connection: Connection, message: Any) -> None:
    """Sends a message, which may hold what `pack` made. Raises OSError where nobody listens."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(len(buffers).to_bytes(8, "little") + head)
    for buffer in buffers:
        with buffer.raw() as content:
            connection.send_bytes(content)


def receive(connection: Connection) -> Any:
    """The next message. Raises EOFError or OSError where the other end is gone."""
    head = connection.recv_bytes()
    count = int.from_bytes(head[:8], "little")
    buffers = [bytearray(connection.recv_bytes()) for _ in range(count)]
    return pickle.loads(memoryview(head)[8:], buffers=buffers)


def pack(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as plain values: type, shape and memory, which need no memory shared by processes."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[name] = (
            str(tensor.dtype)[6:],
            tuple(tensor.shape),
            pickle.PickleBuffer(flat.numpy()),
        )
    return found


def unpack(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of `pack`."""
    found = {}
    for name, (dtype, shape, content) in data.items():
        kind = getattr(torch, dtype)
        empty = not math.prod(shape)
        flat = torch.empty(0, dtype=kind) if empty else torch.frombuffer(content, dtype=kind)
        found[name] = flat.reshape(shape)
    return found
