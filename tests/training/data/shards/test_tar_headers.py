"""Headers of tar files: the members that `tarfile` finds, from few bytes; what is damaged is named, not cut off."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.shards.tar_headers import BLOCK, READ_AHEAD, DamagedTar, TarHeaders, UnusualTar


FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CONTTYPE, tarfile.FIFOTYPE)


def tar_of(members, tar_format=tarfile.GNU_FORMAT):
    """Bytes of a tar file of (name, content, kind)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
            member.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def members_of(data, reads=None):
    def fetch(begin, end):
        if reads is not None:
            reads.append((begin, end))
        return data[begin:end]

    return list(TarHeaders(fetch, len(data)).members())


def by_tarfile(data):
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)
paths = st.lists(names, min_size=1, max_size=6).map("/".join).map(lambda path: path * 4 if len(path) > 20 else path)
members = st.tuples(paths, st.binary(max_size=2000), st.sampled_from(KINDS))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(members, max_size=8), tar_format=st.sampled_from(FORMATS))
def test_members_as_tarfile_finds_them(rows, tar_format):
    try:
        data = tar_of(rows, tar_format)
    except (ValueError, UnicodeError):  # a name too long for this format
        return
    assert members_of(data) == by_tarfile(data)


@pytest.mark.parametrize("size", [0, 100, 12_000, 60_000])
def test_only_headers_of_large_members_are_read(size):
    data = tar_of([(f"{number}.jpg", bytes([7]) * size, tarfile.REGTYPE) for number in range(40)])
    reads = []
    assert members_of(data, reads) == by_tarfile(data)
    read = sum(end - begin for begin, end in reads)
    assert read <= min(len(data), 44 * READ_AHEAD) or size < READ_AHEAD
    assert len(reads) <= 44 and (size > READ_AHEAD or len(reads) < 15)


def test_a_member_of_eight_gibibytes():
    """Its length is binary; of what follows nothing is read here."""
    member = tarfile.TarInfo("large.bin")
    member.size = 9 << 30
    header = member.tobuf(tarfile.GNU_FORMAT)
    headers = TarHeaders(lambda begin, end: (header + bytes(BLOCK))[begin:end].ljust(end - begin, b"\0"), 10 << 30)
    assert list(headers.members()) == [("large.bin", BLOCK, 9 << 30)]


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 3), byte=st.integers(0, BLOCK - 1), value=st.integers(0, 255))
def test_a_header_with_another_byte_is_refused(place, byte, value):
    data = bytearray(tar_of([(f"{number}.jpg", b"x" * 600, tarfile.REGTYPE) for number in range(4)]))
    begin = place * 3 * BLOCK
    if data[begin + byte] == value or 148 <= byte < 156:  # the sum itself: 010 is 10
        return
    data[begin + byte] = value
    with pytest.raises(DamagedTar, match=f"no header at byte {begin:,}" if begin else "no header|compressed"):
        members_of(bytes(data))


def test_signed_sums_of_old_programs_count():
    data = bytearray(tar_of([("caf\xe9.jpg", b"x", tarfile.REGTYPE)]))
    unsigned, signed = tarfile.calc_chksums(bytes(data[:BLOCK]))
    assert unsigned != signed
    data[148:156] = b"%06o\0 " % signed
    assert members_of(bytes(data)) == by_tarfile(bytes(data))


def test_what_is_cut_or_joined_is_said():
    data = tar_of([(f"{number}.jpg", b"x" * 600, tarfile.REGTYPE) for number in range(4)])
    with pytest.raises(DamagedTar, match="breaks off at byte 2,000"):
        members_of(data[:2000])
    with pytest.raises(DamagedTar, match="more follows its end at byte 6,144"):
        members_of(data + data)
    with pytest.raises(DamagedTar, match="breaks off at byte 1,549"):
        members_of(data[: 3 * BLOCK] + b"half a header")
    with pytest.raises(DamagedTar, match="compressed with gzip"):
        members_of(gzip.compress(data).ljust(BLOCK, b"\0"))
    assert members_of(data[: 12 * BLOCK]) == by_tarfile(data)  # without the zeros at the end


def test_sparse_files_and_global_headers_are_left_to_tarfile():
    sparse = tar_of([("a", b"x", tarfile.REGTYPE)])
    header = bytearray(sparse[:BLOCK])
    header[156] = ord("S")
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"}).close()
    for data in (bytes(header) + sparse[BLOCK:], buffer.getvalue()):
        with pytest.raises(UnusualTar):
            members_of(data)
