"""TensorBoard's events file, as far as scalars need it.

A record is its length (8 bytes), a masked CRC-32C of that, an `Event` in protobuf's
wire format, and a masked CRC-32C of the event; see TensorFlow's `record_writer.cc` and
`event.proto`. Libraries that write it import a framework or write on a thread of
their own, which a full disk ends: whoever then hands it a value waits for ever.
"""

import ctypes
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78
"""Of CRC-32C (Castagnoli), lowest bit first."""


class EventsFile:
    """A new events file in `folder`; TensorBoard hides what older ones there say of `first_step` and later."""

    def __init__(self, folder: Path, *, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
        self._file = path.open("xb", buffering=0)
        self._whole = 0
        self._append(_text(3, b"brain.Event:2"))
        self._append(_integer(2, first_step) + _text(7, _integer(1, 1)))  # SessionLog.START

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the values of a step; they are left out where the disk is full."""
        values = [_text(1, _text(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items()]
        if values:
            self._append(_integer(2, step) + _text(5, b"".join(values)))

    def _append(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        record = length + _checksum(length) + event + _checksum(event)
        try:
            whole = self._file.write(record) == len(record)
        except OSError:
            whole = False
        if whole:
            self._whole += len(record)
        else:
            # Behind half a record TensorBoard would read nothing more.
            self._file.truncate(self._whole)
            self._file.seek(self._whole)

    def close(self) -> None:
        """No more values."""
        self._file.close()


# -- Protobuf's wire format ------------------------------------------------------------


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _integer(field: int, number: int) -> bytes:
    return bytes([field << 3]) + _varint(number)


def _text(field: int, content: bytes) -> bytes:
    """A field of bytes, of text, or that is a message."""
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    # Through C, where what is too large becomes infinite; `struct` raises an error.
    return bytes([field << 3 | 5]) + struct.pack("<f", ctypes.c_float(value).value)


# -- Checksums -------------------------------------------------------------------------


def _table() -> list[int]:
    found: list[int] = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        found.append(byte)
    return found


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted: data that hold their own checksums must not check themselves."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
