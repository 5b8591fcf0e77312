"""Files that are replaced as a whole, or left as they were."""

import contextlib
import csv
import errno
import io
import os
import zlib
from pathlib import Path
from typing import Any, Union


def one_line(error: Any, width: int = 300) -> str:
    """What was raised or logged, without line breaks and long lists of keys."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:  # torch's advice is to unpickle whatever the file holds
        text = "it is damaged, or holds more than tensors and plain values, which is never unpickled"
    return text if len(text) <= width else f"{text[:width]} ..."


def printable(path: Union[str, Path]) -> str:
    """A path as text; bytes that are not UTF-8 are shown as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_whole(path: Path, data: Any) -> None:
    """Replace a file, or on any failure leave the previous one.

    Raises:
        OSError: in one line, with the file's name and size; also for a folder, a pipe or a device, which stays.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is there and is no regular file; choose another name")
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        reason = f"cannot write {path} ({len(data) / 1e6:.1f} MB): {error.strerror}"
        kept = "; the previous one is intact" if path.exists() else ""
        room = "; make room, then resume" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(f"{reason}{kept}{room}") from error


def name_and_checksum(path: Union[str, Path]) -> str:
    """The name of a file and a checksum of its bytes: what identifies weights, wherever they lie."""
    return f"{Path(path).name} {zlib.crc32(Path(path).read_bytes()):08x}"


def write_table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """A CSV, as a whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_whole(path, text.getvalue().encode())
