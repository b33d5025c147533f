"""A safetensors file written a tensor at a time, so that no second copy of a model is in memory."""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}  # as in the header


def write_safetensors(
    path: Path,
    layout: dict[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """A safetensors file of the tensors, which need not all be in memory at once.

    The format: the header's length in 8 bytes, the header in JSON, and the values, wider numbers
    first, so that each is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda x: -x[1][0].itemsize):
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            dtype, shape = layout[name]
            assert tensor.shape == shape, name
            file.write(raw(tensor.to(dtype)))
        file.flush()
        os.fsync(file.fileno())


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy if it is contiguous and on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # .view() keeps odd strides of size 1
    return flat.view(torch.uint8).numpy().data
