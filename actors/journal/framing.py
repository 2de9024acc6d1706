"""Records in a file that can be damaged: LevelDB's log framing.

The file is a sequence of blocks of 32 KiB. A record lies in one fragment, or in several where it crosses a block; each
fragment has a header of 11 bytes (checksum, length, kind, check of the header itself) and never crosses a block. A
reader that meets damage goes on at the next block, so a bad sector costs its records and no more.

The checksum covers the fragment's place in the file too, so a block that was moved, repeated or left over is found.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 32 << 10
_HEADER = struct.Struct("<IHBI")  # checksum of the fragment, length, kind, checksum of length and kind
_PLACE = struct.Struct("<QHB")  # offset, length, kind: what the checksums start from
HEADER = _HEADER.size
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
_READ = 64 * BLOCK


@dataclass(frozen=True, slots=True)
class Record:
    """A record that was read back whole. ``end`` is the offset after it."""

    offset: int
    end: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes from ``offset`` to ``end`` that hold no readable record. ``torn``: the file just ends there, as after a
    kill in the middle of a write; nothing that was acknowledged can be in it."""

    offset: int
    end: int
    reason: str
    torn: bool = False


def frame(payload: bytes, offset: int) -> bytes:
    """The bytes to append at ``offset`` of a file so that it holds this record."""
    pieces: list[bytes] = []
    begin, size, first = 0, len(payload), True
    view = memoryview(payload)
    while True:
        room = BLOCK - offset % BLOCK
        if room < HEADER:  # too little for a header: the block ends in zeros
            pieces.append(bytes(room))
            offset += room
            room = BLOCK
        length = min(size - begin, room - HEADER)
        last = begin + length == size
        kind = (FULL if last else FIRST) if first else (LAST if last else MIDDLE)
        place = zlib.crc32(_PLACE.pack(offset, length, kind))
        part = view[begin : begin + length]
        pieces.append(_HEADER.pack(zlib.crc32(part, place), length, kind, place))
        pieces.append(bytes(part))
        offset += HEADER + length
        begin += length
        first = False
        if last:
            return b"".join(pieces)


def read(path: Path, start: int = 0, end: int | None = None) -> Iterator[Record | Damage]:
    """The records of a file in order, and what is damaged between them.

    Args:
        path: the file; it may still be growing.
        start: offset of a record to begin at.
        end: read no further than this offset, which is the end of a record; by default to the end of the file.

    Raises:
        OSError: the file cannot be read at all.
    """
    with open(path, "rb", buffering=0) as file:
        yield from _Reader(file, start, end).records()


class _Reader:
    def __init__(self, file: BinaryIO, start: int, end: int | None) -> None:
        self._file = file
        self._end = end
        self._offset = start  # of the next fragment
        self._base = start - start % BLOCK  # of the buffer
        self._buffer = b""
        self._parts: list[bytes] = []  # of the record that is being put together
        self._began = start
        self._bad: tuple[int, str] | None = None  # where damage began
        self._read_next = BLOCK  # bytes; many files are opened for their first record only

    def records(self) -> Iterator[Record | Damage]:
        while True:
            block = self._offset - self._offset % BLOCK
            room = block + BLOCK - self._offset
            if room < HEADER:
                trailer = self._bytes(self._offset, room)
                if len(trailer) < room:
                    break
                if any(trailer):
                    self._mark(self._offset, "the end of a block is not empty")
                self._offset += room
                continue
            header = self._bytes(self._offset, HEADER)
            if len(header) < HEADER:
                break
            checksum, length, kind, place = _HEADER.unpack(header)
            if place != zlib.crc32(_PLACE.pack(self._offset, length, kind)) or length > room - HEADER:
                zeros_end = self._offset if any(header) else self._zeros_end()
                if zeros_end is None:
                    break
                self._mark(self._offset, "a header does not match its checksum")
                self._offset = max(block + BLOCK, zeros_end - zeros_end % BLOCK)
                continue
            payload = self._bytes(self._offset + HEADER, length)
            if len(payload) < length:
                break
            if zlib.crc32(payload, place) != checksum:
                # Its length is right, so what follows in this block can be read.
                self._mark(self._offset, "the content does not match its checksum")
                self._parts.clear()
                self._offset += HEADER + length
                continue
            yield from self._take(kind, payload)
        yield from self._finish()

    def _take(self, kind: int, payload: bytes) -> Iterator[Record | Damage]:
        offset, self._offset = self._offset, self._offset + HEADER + len(payload)
        if kind in (FULL, FIRST):
            if self._parts:
                self._mark(self._began, "a record has no end")
            yield from self._report(offset)
            self._began = offset
            self._parts = [payload]
        elif self._parts:
            self._parts.append(payload)
        else:
            self._mark(offset, "a record has no beginning")
        if kind in (FULL, LAST) and self._parts:
            record = Record(self._began, self._offset, b"".join(self._parts))
            self._parts = []
            yield record

    def _finish(self) -> Iterator[Damage]:
        """What the file ends in: nothing, a write that was cut off, or damage."""
        size = self._size()
        if self._bad is not None:
            yield from self._report(size)
        elif self._parts or size > self._offset:
            began = self._began if self._parts else self._offset
            yield Damage(began, size, "the file ends in the middle of a record", torn=True)

    def _mark(self, offset: int, reason: str) -> None:
        if self._bad is None:
            self._bad = (self._began if self._parts else offset, reason)
        self._parts = []

    def _report(self, end: int) -> Iterator[Damage]:
        if self._bad is not None:
            offset, reason = self._bad
            self._bad = None
            yield Damage(offset, end, reason)

    def _zeros_end(self) -> int | None:
        """Where the zeros end that some file systems leave after a crash; None: nothing else follows."""
        offset = self._offset
        while chunk := self._bytes(offset, BLOCK):
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            offset += zeros
            if zeros < len(chunk):
                return offset
        return None

    def _bytes(self, offset: int, count: int) -> bytes:
        if self._end is not None:
            count = min(count, max(0, self._end - offset))
        begin = offset - self._base
        if not (begin >= 0 and begin + count <= len(self._buffer)):
            self._file.seek(offset)
            ahead = self._read_next if self._end is None else min(self._read_next, self._end - offset)
            self._base, self._buffer, self._read_next = offset, self._read(max(count, ahead)), _READ
            begin = 0
        return self._buffer[begin : begin + count]

    def _read(self, count: int) -> bytes:
        pieces = []
        while count > 0 and (piece := self._file.read(count)):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _size(self) -> int:
        self._file.seek(0, 2)
        size = self._file.tell()
        return size if self._end is None else min(size, self._end)
