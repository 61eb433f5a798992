"""Bytes that should be UTF-8 text."""

import codecs

MARK = "\ufeff"  # a byte order mark, which editors write in front of UTF-8 too
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins like the first


class NotText(Exception):
    """`found` is what is wrong with the bytes, `at` the first such byte, `change` what to do."""

    def __init__(self, found: str, at: int, change: str) -> None:
        super().__init__(found)
        self.found, self.at, self.change = found, at, change


def decoded(data: bytes, offset: int) -> str:
    """The text of UTF-8 bytes that begin at `offset` of a file. Raises NotText."""
    if offset == 0 and data.startswith(UTF16_MARKS):
        raise NotText("is UTF-16, not UTF-8", 0, "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    if (at := data.find(b"\0")) >= 0:
        change = "name a text file, or convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW, if it is that"
        raise NotText("holds a NUL byte, so it is no UTF-8 text", at, change)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at {offset + error.start}"
        change = "convert it: iconv -f ENCODING -t UTF-8 FILE > NEW"
        raise NotText(f"is not UTF-8 ({byte})", error.start, change) from None
