"""Videos as files: whole frames for later comparison, and gif, webp, mp4 or png to look at."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from accel.errors import AccelError, nearest
from accel.files import write_atomically

__all__ = ["EXTENSIONS", "encode_animation", "load_frames", "save_frames", "write_video"]

KINDS: dict[str, dict[str, int]] = {"gif": {"disposal": 1}, "webp": {"quality": 88}, "png": {}}

Frames = Float[np.ndarray, "_frames _height _width 3"]

EXTENSIONS = (".gif", ".webp", ".mp4", ".png")


def to_bytes(video: Frames) -> UInt8[np.ndarray, "_frames _height _width 3"]:
    """[0, 1] to 0 .. 255, rounded; what lies outside is clipped."""
    return (video.clip(0, 1) * 255).round().astype(np.uint8)


def save_frames(path: str | os.PathLike[str], video: Frames) -> Path:
    """Keep the frames with 8 bits per channel, as a compressed npz; written atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, frames=to_bytes(video))
    return write_atomically(path, buffer.getvalue())


def load_frames(path: str | os.PathLike[str]) -> Frames:
    """What `save_frames` kept, in [0, 1]."""
    with np.load(path, allow_pickle=False) as file:
        return file["frames"].astype(np.float32) / 255


def encode_animation(video: Frames, kind: str, *, fps: int | float, min_side: int = 0) -> bytes:
    """A looping "gif" or "webp", or an image as "png"; frames are enlarged by a whole factor to
    `min_side` pixels.
    """
    factor = max(1, -(-min_side // min(video.shape[1:3])))
    images = [Image.fromarray(frame) for frame in to_bytes(video)]
    size = (images[0].width * factor, images[0].height * factor)
    if factor > 1:
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    buffer = io.BytesIO()
    moving = {
        "save_all": True,
        "append_images": images[1:],
        "duration": round(1000 / fps),
        "loop": 0,
    }
    images[0].save(buffer, kind, **(moving if len(images) > 1 else {}), **KINDS[kind])
    return buffer.getvalue()


def write_video(
    path: str | os.PathLike[str], video: Frames, *, fps: int | float, min_side: int = 0
) -> Path:
    """Write a gif, a webp or an mp4, by the extension of `path`; an image as a png, too."""
    path = checked_path(path)
    if path.suffix.lower() == ".png" and len(video) > 1:
        raise AccelError(
            f"a video of {len(video)} frames cannot be written to {str(path)!r};"
            f" write {path.with_suffix('.gif').name!r} instead"
        )
    if path.suffix.lower() == ".mp4":
        return _write_mp4(path, video, fps)
    kind = path.suffix.lower()[1:]
    return write_atomically(path, encode_animation(video, kind, fps=fps, min_side=min_side))


def checked_path(path: str | os.PathLike[str]) -> Path:
    """`path`, or an error that names the extensions there are."""
    path = Path(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise AccelError(
            f"no video can be written to {str(path)!r}: its extension is {path.suffix!r};"
            f" {nearest(path.suffix, EXTENSIONS)}"
        )
    return path


def _write_mp4(path: Path, video: Frames, fps: int | float) -> Path:
    from accel.metrics import import_cv2

    cv2 = import_cv2()
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = video.shape[1:3]
    part = path.with_name(f"{path.stem}.part.mp4")
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise AccelError(
            f"OpenCV has no mp4 encoder here; write {path.with_suffix('.gif')} instead"
        )
    for frame in to_bytes(video):
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return part.replace(path)
