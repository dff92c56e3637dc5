"""Two small edits to a serialised ONNX model, which need no onnx package.

A protobuf message may be extended by appending to it: repeated fields merge. So an inner value becomes an output, or
a name an input, by some bytes at the end (ModelProto.graph is field 7, GraphProto.input 11 and .output 12).
"""

from __future__ import annotations

from typing import Any


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def with_output(model: bytes, value: str) -> bytes:
    """The model with the inner `value` as its last output."""
    return model + _message(7, _message(12, _message(1, value.encode())))


def with_input(model: bytes, value: str) -> bytes:
    """The model with its first consumer of the inner `value` fed by a new input, a float vector named "?" + value[1:].

    The name must not occur in the model before the node that computes it, and the consumer must come next.
    """
    old, new = value.encode(), b"?" + value.encode()[1:]
    at = model.index(old, model.index(old) + len(old))
    float_vector = _message(1, b"\x08\x01" + _message(2, _message(1, _message(2, b"N"))))
    described = _message(1, new) + _message(2, float_vector)
    return model[:at] + new + model[at + len(old) :] + _message(7, _message(11, described))


def session(model: bytes, threads: int) -> Any:
    """An ONNX Runtime session on the CPU with `threads` threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
