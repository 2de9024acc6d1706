"""Records in a file: what is read back is what was written, and every damage is reported."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.journal.framing import BLOCK, HEADER, Damage, Record, frame, read

records = st.lists(
    st.one_of(st.binary(max_size=200), st.integers(0, 3 * BLOCK).map(lambda size: random.Random(size).randbytes(size))),
    max_size=8,
)
relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60, print_blob=True
)


def write(path: Path, payloads: list[bytes]) -> bytes:
    content = b""
    for payload in payloads:
        content += frame(payload, len(content))
    path.write_bytes(content)
    return content


def contents(path: Path) -> tuple[list[bytes], list[Damage]]:
    found = list(read(path))
    return [one.payload for one in found if isinstance(one, Record)], [one for one in found if isinstance(one, Damage)]


def is_part_of(some: list[bytes], all_of_them: list[bytes]) -> bool:
    """Whether these are among those, in the same order."""
    remaining = iter(all_of_them)
    return all(any(one == other for other in remaining) for one in some)


@given(payloads=records)
@relaxed
def test_what_was_written_is_read(tmp_path: Path, payloads: list[bytes]) -> None:
    write(tmp_path / "file", payloads)
    assert contents(tmp_path / "file") == (payloads, [])


@pytest.mark.parametrize("left", range(HEADER + 3))
def test_a_block_ends_in_a_fragment_or_in_less_than_a_header_of_zeros(tmp_path: Path, left: int) -> None:
    """With just a header left its fragment is empty. A byte that is wrong there is found, and costs no other record."""
    payloads = [b"a" * (BLOCK - HEADER - left), b"b" * 100, b"c"]
    content = write(tmp_path / "file", payloads)
    assert contents(tmp_path / "file") == (payloads, [])
    (tmp_path / "file").write_bytes(content[: BLOCK - 1] + b"x" + content[BLOCK:])
    read_back, (damage,) = contents(tmp_path / "file")
    lost = 0 if left == 0 else 1 if left >= HEADER else None
    assert read_back == [payload for number, payload in enumerate(payloads) if number != lost]
    assert not damage.torn


def test_a_fragment_never_crosses_a_block_whatever_its_header_says(tmp_path: Path) -> None:
    """What is forged, or left over of a larger block: its checksums are right."""
    length = BLOCK
    place = zlib.crc32(struct.pack("<QHB", 0, length, 1))
    payload = bytes(length)
    forged = struct.pack("<IHBI", zlib.crc32(payload, place), length, 1, place) + payload
    content = forged.ljust(2 * BLOCK, b"\0")
    (tmp_path / "file").write_bytes(content + frame(b"next", len(content)))
    read_back, (damage,) = contents(tmp_path / "file")
    assert (read_back, damage.offset) == ([b"next"], 0)


@pytest.mark.parametrize("beyond", range(4))
def test_a_part_of_a_file_ends_anywhere_in_what_is_read_at_once(tmp_path: Path, beyond: int) -> None:
    write(tmp_path / "file", [b"", b"b" * (BLOCK - 2 * HEADER + beyond), b"c"])
    for record in [one for one in read(tmp_path / "file") if isinstance(one, Record)]:
        assert list(read(tmp_path / "file", record.offset, record.end)) == [record]


@given(payloads=records, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@relaxed
def test_any_flipped_bit_is_reported_and_no_wrong_record_is_read(
    tmp_path: Path, payloads: list[bytes], where: float, bit: int
) -> None:
    content = bytearray(write(tmp_path / "file", payloads))
    if not content:
        return
    content[int(where * len(content))] ^= 1 << bit
    (tmp_path / "file").write_bytes(content)
    read_back, damage = contents(tmp_path / "file")
    assert damage
    assert is_part_of(read_back, payloads)


def test_every_byte_of_a_small_file(tmp_path: Path) -> None:
    """A flip anywhere is damage, not an end; a cut anywhere is an end, not damage."""
    payloads = [bytes([n]) * (n % 7) for n in range(30)]
    content = write(tmp_path / "file", payloads)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        (tmp_path / "file").write_bytes(flipped)
        read_back, damage = contents(tmp_path / "file")
        assert damage
        assert not any(one.torn for one in damage)
        assert is_part_of(read_back, payloads)
        (tmp_path / "file").write_bytes(content[:place])
        read_back, damage = contents(tmp_path / "file")
        assert read_back == payloads[: len(read_back)]
        assert all(one.torn for one in damage)


def test_a_lost_block_costs_its_records_only(tmp_path: Path) -> None:
    payloads = [bytes([n % 256]) * 1000 for n in range(200)]
    content = bytearray(write(tmp_path / "file", payloads))
    content[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    (tmp_path / "file").write_bytes(content)
    read_back, damage = contents(tmp_path / "file")
    assert len(damage) == 1
    assert 2 * BLOCK - 1100 <= damage[0].offset <= 2 * BLOCK
    assert 200 - len(read_back) <= BLOCK // 1000 + 3
    assert is_part_of(read_back, payloads)


@pytest.mark.parametrize("end", [0, 7, 4096, 20_480, 28_672, BLOCK - 1])
def test_behind_a_hole_of_zeros_all_is_read_from_the_next_block_on(tmp_path: Path, end: int) -> None:
    """Wherever in a block the hole ends."""
    payloads = [bytes([n % 255 + 1]) * 1000 for n in range(400)]
    content = bytearray(write(tmp_path / "file", payloads))
    found = [one for one in read(tmp_path / "file") if isinstance(one, Record)]
    hole = slice(BLOCK + 100, 5 * BLOCK + end)
    content[hole] = bytes(hole.stop - hole.start)
    (tmp_path / "file").write_bytes(content)
    read_back, (damage,) = contents(tmp_path / "file")
    resumed = 5 * BLOCK if end == 0 else 6 * BLOCK
    whole = [one.payload for one in found if one.end <= hole.start or one.offset >= resumed]
    assert read_back == whole
    assert hole.start - 1011 <= damage.offset <= hole.start
    assert resumed <= damage.end <= resumed + 1011


@pytest.mark.parametrize("moved", ["swapped", "repeated"])
def test_a_block_in_the_wrong_place_is_found(tmp_path: Path, moved: str) -> None:
    content = bytearray(write(tmp_path / "file", [b"x" * (6 * BLOCK)]))
    first, second = bytes(content[BLOCK : 2 * BLOCK]), bytes(content[2 * BLOCK : 3 * BLOCK])
    content[BLOCK : 3 * BLOCK] = second + first if moved == "swapped" else first + first
    (tmp_path / "file").write_bytes(content)
    read_back, damage = contents(tmp_path / "file")
    assert not read_back
    assert damage


def test_zeros_at_the_end_are_an_end(tmp_path: Path) -> None:
    """Some file systems leave them after a crash."""
    content = write(tmp_path / "file", [b"one", b"two"])
    (tmp_path / "file").write_bytes(content + bytes(3 * BLOCK))
    read_back, damage = contents(tmp_path / "file")
    assert read_back == [b"one", b"two"]
    assert [one.torn for one in damage] == [True]


@given(payloads=records, synced=st.integers(0, 8), data=st.data())
@relaxed
def test_pages_that_a_power_loss_takes_cost_no_synced_record(
    tmp_path: Path, payloads: list[bytes], synced: int, data: st.DataObject
) -> None:
    """Of what was not synced any pages of 4 KiB may be on the disk; the others are zeros, or not there at the end."""
    content = bytearray(write(tmp_path / "file", payloads))
    ends = [0, *(one.end for one in read(tmp_path / "file") if isinstance(one, Record))]
    safe = ends[min(synced, len(payloads))]
    pages = range(safe // 4096, -(-len(content) // 4096))
    kept = data.draw(st.sets(st.sampled_from(pages)) if pages else st.just(set()))
    for page in set(pages) - kept:
        content[max(safe, page * 4096) : (page + 1) * 4096] = bytes(
            len(content[max(safe, page * 4096) : (page + 1) * 4096])
        )
    size = len(content) if data.draw(st.booleans()) else max(safe, min(len(content), (max(kept, default=0) + 1) * 4096))
    (tmp_path / "file").write_bytes(content[:size])
    read_back, _ = contents(tmp_path / "file")
    assert read_back[:synced] == payloads[:synced]
    assert is_part_of(read_back, payloads)


class Counting(io.FileIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(-1 if size is None else size) or b""
        Counting.count += len(content)
        return content


def bytes_read(path: Path, monkeypatch: pytest.MonkeyPatch, **part: int) -> int:
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode, buffering: Counting(path, mode))
        Counting.count = 0
        list(read(path, **part))
    return Counting.count


@pytest.mark.parametrize("every", [1, 64], ids=["one hole", "many holes"])
def test_holes_of_zeros_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """As lost pages leave them, with records behind."""
    records = b"".join(frame(bytes([n]) * 1000, 0) for n in range(20))
    content = bytearray(16 << 20)
    for begin in range(0, len(content), len(content) // every):
        content[begin : begin + len(records)] = records
    content += frame(b"the last", len(content))
    (tmp_path / "file").write_bytes(content)
    assert contents(tmp_path / "file")[0][-1] == b"the last"
    assert bytes_read(tmp_path / "file", monkeypatch) < 2 * len(content)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write(tmp_path / "file", [b"x" * 5000 for _ in range(200)])
    assert len(content) > 30 * BLOCK
    found = [one for one in read(tmp_path / "file") if isinstance(one, Record)]
    assert bytes_read(tmp_path / "file", monkeypatch, start=found[0].end, end=found[1].end) < 6000


def test_a_part_of_a_file_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "file", [b"a" * 40_000, b"b" * 40_000, b"c"])
    found = [one for one in read(tmp_path / "file") if isinstance(one, Record)]
    part = list(read(tmp_path / "file", found[1].offset, found[1].end))
    assert part == [found[1]]
