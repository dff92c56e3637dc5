"""BeaverVision: give a face speech.

from beavervision import lipsync
lipsync("portrait.png", "hello.mp4", text="Hello there.")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beavervision.pipeline import Pipeline, Report, lipsync

__all__ = ["Pipeline", "Report", "lipsync"]


def __getattr__(name: str) -> Any:
    """Load the pipeline, with its codecs and runtimes, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from beavervision import pipeline

    return getattr(pipeline, name)
