"""Thrift's compact protocol, as far as parquet files need it: one struct, bounded in values and in depth.

As https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md describes it.
"""

from typing import Any

from pipeline.offline.parquet.encodings import Cut, Damaged, Unsupported, varint, zigzag

MAX_DEPTH = 12  # structs and lists in one another; a parquet footer has 8
MAX_VALUES = 2**22  # fields and elements of one struct, at most some 100 bytes of memory each; a footer has thousands
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13
_FIXED = {_TRUE: 1, _FALSE: 1, _BYTE: 1, _DOUBLE: 8, _UUID: 16}  # bytes; a bool has one in a list

Fields = dict[int, Any]  # id → bool, int, bytes, Fields or a list of those; None for kinds that parquet does not use


def read_struct(data: bytes) -> tuple[Fields, int]:
    """The fields of the struct at the beginning of `data`, and where it ends.

    Raises:
        Cut: it goes on after the end of `data`.
        Damaged: no struct is there, or one of more than MAX_DEPTH levels or MAX_VALUES values.
    """
    reader = _Reader(data)
    return reader.struct(0), reader.at


def number(fields: Fields, field: int, least: int = 0, most: int = 2**63 - 1) -> int:
    """A number that must be there. Raises Damaged for one that cannot be, Unsupported for one above `most`."""
    value = fields.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Damaged(f"a header without its number {field}")
    if value < least or most < 2**31 <= value:
        raise Damaged(f"a header with the impossible number {value:,}")
    if value > most:
        raise Unsupported(f"a header with {value:,} where at most {most:,} is supported")
    return value


def struct(fields: Fields, field: int) -> Fields:
    """A struct that must be there. Raises Damaged."""
    value = fields.get(field)
    if not isinstance(value, dict):
        raise Damaged(f"a header without its part {field}")
    return value


def structs(fields: Fields, field: int) -> list[Fields]:
    """A list of structs; none where it is not there. Raises Damaged."""
    value = fields.get(field, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Damaged(f"a header without its list {field}")
    return value


def text(fields: Fields, field: int) -> str:
    """A text that must be there. Raises Damaged."""
    value = fields.get(field)
    if not isinstance(value, bytes):
        raise Damaged(f"a header without its text {field}")
    return value.decode("utf-8", "backslashreplace")


class _Reader:
    """A place in the data, and how many values may still come."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at, self._left = data, 0, MAX_VALUES

    def struct(self, depth: int) -> Fields:
        self._enter(depth)
        fields: Fields = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else zigzag(self._varint())
            if field in fields or not 0 < field < 2**15:
                raise Damaged(f"a header with the field {field} out of place")
            kind = head & 15
            fields[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
            self._count()
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if _BYTE < kind <= _I64:
            return zigzag(self._varint())
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind == _MAP:
            return self._skip_map(depth + 1)
        if kind not in _FIXED:
            raise Damaged(f"a header with the unknown type {kind}")
        self._bytes(_FIXED[kind])
        return None

    def _list(self, depth: int) -> list[Any]:
        self._enter(depth)
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        items = []
        for _ in range(length):  # each has at least a byte
            items.append(self._value(head & 15, depth))
            self._count()
        return items

    def _skip_map(self, depth: int) -> None:
        self._enter(depth)
        length = self._varint()
        kinds = self._byte() if length else 0
        for _ in range(length):
            self._value(kinds >> 4, depth)
            self._value(kinds & 15, depth)
            self._count()

    def _enter(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise Damaged(f"a header of more than {MAX_DEPTH} levels")

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Damaged(f"a header of more than {MAX_VALUES:,} values")

    def _varint(self) -> int:
        value, self.at = varint(self._data, self.at)
        return value

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > len(self._data):
            raise Cut("a header is cut short")
        return self._data[start : self.at]
