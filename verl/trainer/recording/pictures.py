"""Pictures of recorded rollouts: each once for the whole run, by content, of a bounded size.

A picture's name is the SHA-256 of the bytes in its file.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from spatialthinker.storage.images import BrokenImage, encode, load_image
from verl.model.videos import Video
from verl.trainer.recording.files import write_whole

MAX_BYTES = 131_072
"""Larger pictures are stored as a JPEG: 38,400 of this size, all prompts of 75 steps of 512, are 5 GB."""
MAX_PIXELS = 1_048_576
"""Pixels of such a JPEG at most; boxes have the frame that their row states."""
JPEG_QUALITIES = (80, 60, 40)
"""Tried in this order, until one is small enough."""
FRAMES_OF_VIDEO = 8
"""Frames that stand for a video, at the size that the model sees."""


def choose_frames(video: Video) -> list[np.ndarray]:
    """Evenly spaced frames [height, width, 3] of a video, the first and the last among them."""
    frames = video.frames
    places = np.linspace(0, len(frames) - 1, FRAMES_OF_VIDEO).round().astype(int)
    return [frames[index] for index in sorted(set(places))]


def store_frame(folder: Path, frame: np.ndarray) -> str:
    """As store_picture for a frame [height, width, 3] of a video, as a JPEG."""
    return store_picture(folder, encode(Image.fromarray(frame), "JPEG", quality=JPEG_QUALITIES[0]))


def store_picture(folder: Path, picture: bytes) -> str:
    """Writes a picture into a folder of pictures, if it is not there yet; returns its name.

    Raises:
        OSError: the disk takes no more.
    """
    data = shrink(picture)
    name = hashlib.sha256(data).hexdigest()
    path = folder / name[:2] / name
    # Of the right size: after a loss of power a file may be there without its content.
    if not path.is_file() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda place: place.write_bytes(data), is_synced=False)
    return name


def shrink(picture: bytes) -> bytes:
    """The encoded picture, or a smaller JPEG of it when it has more than MAX_BYTES and can be decoded."""
    if len(picture) <= MAX_BYTES:
        return picture
    try:
        image = load_image(picture)
    except BrokenImage:
        return picture
    scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    small = picture
    for quality in JPEG_QUALITIES:
        if len(small) > MAX_BYTES:
            small = min(small, encode(image, "JPEG", quality=quality), key=len)
    return small
