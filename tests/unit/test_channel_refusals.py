"""The control channel refuses what is no message or tensor of its own, without losing its place."""

import os
import random

import msgspec
import pytest
import torch
from channels import (
    CONTENT,
    INLINE,
    LASTING,
    NONE,
    PLACES,
    SENTINEL,
    SHARED,
    TO_WORKER,
    assert_refused_in_place,
    frame,
    header,
    memory,
    recorded_frame,
)
from support import open_descriptors

from fastusp_backend.errors import ProtocolError

pytestmark = pytest.mark.unit


def test_random_bytes_are_refused(pair):
    numbers = random.Random(0)
    for _ in range(500):
        pair.send_bytes(numbers.randbytes(numbers.randrange(0, 200)))
        assert_refused_in_place(pair)
        listed = numbers.choice((0, 0, 10))
        pair.send_bytes(header(numbers.randrange(2), 40, listed) + numbers.randbytes(numbers.randrange(40, 90)))
        assert_refused_in_place(pair)


@pytest.mark.parametrize("tensors", [None, {"x": torch.ones(3, 5)}], ids=["message", "tensors"])
@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_flipped_bits_never_desynchronise(pair, message, tensors):
    valid = recorded_frame(message, tensors)
    numbers = random.Random(len(valid))
    refused = 0
    for _ in range(400):
        flipped = bytearray(valid)
        for _ in range(numbers.choice((1, 1, 1, 2, 8))):
            flipped[numbers.randrange(len(flipped))] ^= 1 << numbers.randrange(8)
        pair.send_bytes(bytes(flipped))
        pair.client.send(SENTINEL)
        try:
            pair.worker.receive()
        except ProtocolError:
            refused += 1
        assert pair.worker.receive() == (SENTINEL, {})
    assert refused > 40


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_truncated_frames_are_refused(pair, message):
    valid = recorded_frame(message, {"x": torch.ones(3)})
    for length in range(len(valid)):
        pair.send_bytes(valid[:length])
        assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "content",
    [
        {"type": "Unknown", "id": 1},
        {"id": 1},
        {"type": "Cancel"},
        {"type": "Cancel", "id": 1, "more": 2},
        {"type": "Cancel", "id": "1"},
        {"type": "Cancel", "id": None},
        {"type": 3, "id": 1},
        {"type": "Message"},
        {"type": "Request", "id": 1},
        ["Cancel", 1],
        None,
        "Shutdown",
    ],
    ids=str,
)
def test_unknown_messages_are_refused(pair, content):
    pair.send_bytes(frame(content))
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 100_000,
        b"\x81\xa4type\xa6Cancel\x00",
        b"\x82\xa4type\xa6Cancel\xa2id\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"",
    ],
    ids=["deep", "trailing", "no msgpack", "endless map", "empty"],
)
def test_hostile_msgpack_is_refused(pair, body):
    pair.send_bytes(header(NONE, len(body)) + body)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "lie",
    [
        frame(SENTINEL, carrier=SHARED, places=PLACES),
        frame(SENTINEL, carrier=LASTING, places=PLACES),
        frame(SENTINEL, carrier=SHARED, places=b"12345678"),
        frame(SENTINEL, carrier=SHARED, places=PLACES, blob=CONTENT),
        frame(SENTINEL, carrier=INLINE),
        frame(SENTINEL, carrier=NONE, blob=b"12345678"),
        frame(SENTINEL, carrier=NONE, places=PLACES),
        frame(SENTINEL, carrier=INLINE, places=b"\xff" * 64),
        frame(SENTINEL, carrier=INLINE, blob=CONTENT),
        frame(SENTINEL, carrier=4),
        frame(SENTINEL, carrier=255),
        header(NONE, 2**32 - 1) + b"\x80",
        header(INLINE, 1, 2**32 - 1) + b"\x80" * 2,
        header(NONE, 1, magic=b"fu") + b"\x80",
    ],
    ids="no fd|nothing lasts|no places|no fd, blob|nothing|blob|places|garbage|blob alone|carrier 4|carrier 255|length|"
    "places' length|magic".split("|"),
)
def test_a_header_that_lies_is_refused(pair, lie):
    pair.send_bytes(lie)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "places",
    [
        {"x": ["float32", [4], 0]},
        {"x": ["float32", [3], 4]},
        {"x": ["float32", [3], 1 << 62]},
        {"x": ["float32", [2], 2]},
        {"x": ["float32", [3], -12]},
        {"x": ["float32", [-3], 0]},
        {"x": ["float32", [1 << 40, 1 << 40], 0]},
        {"x": ["float32", [0, 1 << 63], 0]},
        {"x": ["float99", [3], 0]},
        {"x": ["load", [3], 0]},
        {"x": ["float32", [3], 0, 1]},
        {"x": ["float32", [3]]},
        {3: ["float32", [3], 0]},
        [["float32", [3], 0]],
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("carrier", [INLINE, SHARED, LASTING])
def test_places_that_lie_are_refused(pair, places, carrier):
    lie = msgspec.msgpack.encode(places)
    if carrier == INLINE:
        pair.send_bytes(frame(SENTINEL, carrier=INLINE, places=lie, blob=CONTENT))
    else:
        fd = memory(CONTENT, sealed=True)
        pair.send_with(fd, frame(SENTINEL, carrier=carrier, places=lie))
        os.close(fd)
    assert_refused_in_place(pair)


def test_crafted_places_are_taken_when_they_do_not_lie(pair):
    """Those above differ from these in what they say alone."""
    pair.send_bytes(frame(SENTINEL, carrier=INLINE, places=PLACES, blob=CONTENT))
    message, tensors = pair.worker.receive()
    assert message == SENTINEL and torch.equal(tensors["x"], torch.ones(3))


def test_a_crafted_descriptor_is_taken_when_it_is_sealed(pair):
    """The tests of refused descriptors below differ from this one in the descriptor alone."""
    fd = memory(CONTENT, sealed=True)
    pair.send_with(fd, frame(SENTINEL, carrier=SHARED, places=PLACES))
    os.close(fd)
    message, tensors = pair.worker.receive()
    assert message == SENTINEL and torch.equal(tensors["x"], torch.ones(3))


@pytest.mark.parametrize("kind", ["unsealed", "file", "pipe", "empty", "short"])
def test_other_descriptors_are_refused(pair, tmp_path, kind):
    spare = []
    if kind == "file":
        (tmp_path / "file").write_bytes(CONTENT)
        fd = os.open(tmp_path / "file", os.O_RDONLY)
    elif kind == "pipe":
        fd, other = os.pipe()
        spare.append(other)
    else:
        content = {"unsealed": CONTENT, "empty": b"", "short": CONTENT[:8]}[kind]
        fd = memory(content, sealed=kind != "unsealed")
    pair.send_with(fd, frame(SENTINEL, carrier=SHARED, places=PLACES))
    for open_fd in (fd, *spare):
        os.close(open_fd)
    assert_refused_in_place(pair)


@pytest.mark.parametrize(
    "start", [header(SHARED, 10, magic=b"XX"), header(SHARED, 99), header(7, 10), header(NONE, 10)]
)
def test_a_refused_header_takes_its_descriptor_along(pair, start):
    fd = memory(CONTENT, sealed=True)
    before = open_descriptors()
    pair.send_with(fd, start + b"\xc0" * 10)
    assert_refused_in_place(pair)
    assert open_descriptors() == before
    os.close(fd)
