"""Reading video: a file becomes fitted uint8 frames, picked by timestamp.

The way of one clip: :mod:`probe` looks at the container and judges whether the file is whole; :mod:`choose`
opens it with PyAV, or decord where named; :mod:`picking` turns timestamps into frame indices; the reader hands over
those frames upright; :mod:`cogcache.pictures` resizes and crops each as it comes; :mod:`clip` strings this together.

Colours are converted with the matrix and range that the stream declares (BT.601, limited, where it declares
none, as FFmpeg does). HDR transfer curves are not tone-mapped.
"""

from __future__ import annotations

from cogcache.video.choose import open_video
from cogcache.video.clip import Clip, ClipRequest, load_clip, load_first_frame
from cogcache.video.picking import Window
from cogcache.video.protocol import VideoInfo, VideoReader

__all__ = [
    "Clip",
    "ClipRequest",
    "VideoInfo",
    "VideoReader",
    "Window",
    "load_clip",
    "load_first_frame",
    "open_video",
]
