"""Takes the machine code of other architectures out of a CUDA library, so that it compresses to a fraction.

Sizes and offsets stay: what is not wanted becomes zeros. The layout of the section ``.nv_fatbin``: containers, each with a
header (magic number, version, size of the header, size of what follows) and entries (kind: 1 PTX, 2 machine code; size of the
entry's header; size of its code; architecture).
"""

import struct

MAGIC = 0xBA55ED50
MACHINE_CODE = 2


def keep_architectures(library: bytearray, wanted: set[int]) -> int:
    """Zeroes everything but the machine code for `wanted` (90 is compute capability 9.0); returns how many bytes that were."""
    begin, size = section(library, b".nv_fatbin")
    position, end, zeroed = begin, begin + size, 0
    while position + 16 <= end:
        magic, _, header, content = struct.unpack_from("<IHHQ", library, position)
        if magic != MAGIC:  # between containers
            position += 8
            continue
        entry, last = position + header, position + header + content
        while entry < last:
            kind, _, entry_header, code = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            if kind != MACHINE_CODE or architecture not in wanted:
                library[entry + entry_header : entry + entry_header + code] = bytes(code)
                zeroed += code
            entry += entry_header + code
        position = (last + 7) // 8 * 8
    return zeroed


def section(library: bytes | bytearray, name: bytes) -> tuple[int, int]:
    """(offset, size) of a section of an ELF file of 64 bits."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("expected an ELF file of 64 bits, got something else")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", library, 0x3A)

    def of(index: int) -> tuple[int, int, int]:
        (name_at,) = struct.unpack_from("<I", library, table + index * entry_size)
        offset, size = struct.unpack_from("<QQ", library, table + index * entry_size + 0x18)
        return name_at, offset, size

    _, strings, _ = of(names)
    for index in range(count):
        name_at, offset, size = of(index)
        if library[strings + name_at : strings + name_at + len(name) + 1] == name + b"\0":
            return offset, size
    raise ValueError(f"expected a section {name.decode()}, got none; is this a library with CUDA code?")
