"""Images and videos of a benchmark beside its rows: in its folder, or in zip archives that are read in place."""

import lzma
import os
import tempfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath

from spatialthinker.storage.images import find_image, read_file

MIN_DECODED_SHARE = 0.95
"""Share of the frames that a video's header announces below which it counts as broken."""

ARCHIVE_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, RuntimeError)
"""Exceptions that zipfile raises for a damaged, encrypted or unknown archive."""


class MediaFolder:
    """The files below a folder and in the archives that lie in it."""

    def __init__(self, folder: Path, archives: tuple[str, ...] = ()) -> None:
        """Read the archives' lists of files. Errors: ValueError for an archive that is not whole."""
        self.folder = folder
        found = {path for pattern in archives for path in folder.glob(f"**/{pattern}")}
        self.archives = sorted(path for path in found if path.suffix == ".zip" and path.is_file())
        self._places: dict[str, tuple[Path, str]] = {}
        for archive in self.archives:
            for member in _open_archive(archive, os.getpid()).namelist():
                parts = PurePosixPath(member).parts
                for start in range(len(parts)):  # archives wrap their files in folders that the rows do not name
                    self._places.setdefault("/".join(parts[start:]), (archive, member))

    def find_member(self, name: str) -> tuple[Path, str] | None:
        """Return the archive and the member of a file, None where no archive holds it."""
        parts = PurePosixPath(name).parts
        while parts:  # and rows name folders that the archive does not have
            if found := self._places.get("/".join(parts)):
                return found
            parts = parts[1:] if len(parts) > 2 else ()
        return None

    def has(self, name: str) -> bool:
        """True for a file that is in the folder or in an archive."""
        return (self.folder / name).is_file() or self.find_member(name) is not None

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Errors: ValueError for one that is not there or damaged."""
        if not (self.folder / name).is_file() and (place := self.find_member(name)):
            archive, member = place
            try:
                return _open_archive(archive, os.getpid()).read(member)
            except ARCHIVE_FAULTS as error:
                raise ValueError(f"{archive}: {member} cannot be read: {error}") from None
        source = find_image(name, self.folder)
        return b"" if source is None else read_file(source)


@lru_cache(maxsize=64)
def _open_archive(path: Path, process: int) -> zipfile.ZipFile:
    """Return the open archive; each process has its own, since a file's position is shared after a fork."""
    try:
        return zipfile.ZipFile(path)
    except ARCHIVE_FAULTS as error:
        raise ValueError(f"{path}: no whole zip archive ({error}); fetch it again") from None


def place_frames(total: int, count: int) -> list[int]:
    """Return the positions of at most `count` frames, evenly from the first to the last.

    floor(i (total - 1) / (count - 1)): numpy's linspace as whole numbers, as the loaders of VSI-Bench and SITE do.
    """
    count = min(count, total)
    return [i * (total - 1) // (count - 1) for i in range(count)] if count > 1 else [0] * count


def read_frames(video: bytes, count: int) -> list[bytes]:
    """Return frames of a video as PNG files, decoded by OpenCV, as vLLM's processors do.

    Errors: ValueError for a video that cannot be decoded, or of which a part is missing.
    """
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(video)
        file.flush()
        frames, decoded, announced = _decode(file.name, count, None)
        if decoded < announced and decoded >= MIN_DECODED_SHARE * announced:
            frames, decoded, announced = _decode(file.name, count, decoded)  # headers overstate by a few
    if decoded < announced or not frames:
        raise ValueError(f"the video cannot be decoded: {decoded} of {announced} frames")
    return frames


def _decode(path: str, count: int, total: int | None) -> tuple[list[bytes], int, int]:
    """Return the frames, the number of those decoded and the number there should be."""
    import cv2

    capture = cv2.VideoCapture(path)
    try:
        if not capture.isOpened():
            return [], 0, 0
        total = total or max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        wanted = set(place_frames(total, count))
        frames = []
        for position in range(total):
            if not capture.grab():
                return frames, position, total
            if position in wanted:
                is_decoded, frame = capture.retrieve()
                if not is_decoded:
                    return frames, position, total
                frames.append(cv2.imencode(".png", frame, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
        return frames, total, total
    finally:
        capture.release()
