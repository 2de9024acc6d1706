"""Records in a file: what is read back is what was written, and every damage is reported."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.framing import BLOCK, Damage, Record, frame, read

records = st.lists(
    st.one_of(st.binary(max_size=200), st.integers(0, 3 * BLOCK).map(lambda size: random.Random(size).randbytes(size))),
    max_size=8,
)
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


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


def test_a_part_of_a_file_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "file", [b"a" * 40_000, b"b" * 40_000, b"c"])
    found = [one for one in read(tmp_path / "file") if isinstance(one, Record)]
    part = list(read(tmp_path / "file", found[1].offset, found[1].end))
    assert part == [found[1]]
