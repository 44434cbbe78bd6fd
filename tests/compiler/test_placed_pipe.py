"""Messages to ranks: tensors arrive as they were, their memory is not pickled."""

from __future__ import annotations

import pickle
import threading
from multiprocessing import Pipe

import pytest
import torch

from plait.compiler.placed import pipe


def test_tensors_of_any_type_arrive_as_they_were() -> None:
    tensors = {
        "large": torch.randn(300, 1000),
        "strided": torch.randn(6, 8).t()[::2],
        "half": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }
    here, there = Pipe()
    message = ("result", 3, pipe.pack(tensors))
    sender = threading.Thread(target=pipe.send, args=(here, message))
    sender.start()
    kind, number, content = pipe.receive(there)
    sender.join()
    assert (kind, number) == ("result", 3)
    found = pipe.unpack(content)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        found[name].zero_()  # memory of its own


def test_memory_is_left_out_of_what_is_pickled() -> None:
    packed = pipe.pack({"x": torch.zeros(100_000)})
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)) < 300
    assert [buffer.raw().nbytes for buffer in buffers] == [400_000]


def test_a_closed_end_is_an_error() -> None:
    here, there = Pipe()
    there.close()
    with pytest.raises(OSError):
        pipe.send(here, ("x", pipe.pack({"x": torch.zeros(4)})))
    with pytest.raises((EOFError, OSError)):
        pipe.receive(here)
