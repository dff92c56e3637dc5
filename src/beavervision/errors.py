"""Every error a user can meet, and the exit code of its class.

::

    BeaverVisionError            1   anything that has no narrower class
    |-- UsageError               2   options that contradict or miss something
    |-- InputError               3   the material given cannot be used
    |   |-- MediaError           3     a file that is empty, damaged or no media
    |   |-- NoFaceError          3     no frame holds a face
    |   |-- NoAudioError         3     sound was needed and there is none
    |   `-- TextError            3     text that is empty or that the voice cannot say
    |-- OutputError              4   the result cannot be written (rights, full disk)
    |-- ModelError               5   a model is missing, damaged or not allowed
    |   `-- LicenceError         5     its licence was not accepted
    |-- DeviceError              6   the device asked for is not there or is out of memory
    |-- BusyError                7   no more live sessions, or no more sound, can be taken now
    `-- Interrupted            130   stopped by the user; nothing was left behind

Each message says what is wrong and what to do. Errors of libraries are translated where they enter
(the decoder, the encoder, the runtimes), with the original as ``__cause__``.
"""

from __future__ import annotations


class BeaverVisionError(Exception):
    """Base of all errors; ``code`` is a stable name for machines, ``exit_code`` the process's."""

    code = "error"
    exit_code = 1


class UsageError(BeaverVisionError):
    """Options that contradict each other or miss something."""

    code = "usage"
    exit_code = 2


class InputError(BeaverVisionError):
    """The material given cannot be used."""

    code = "input"
    exit_code = 3


class MediaError(InputError):
    """A file that is empty, damaged or no media."""

    code = "media"


class NoFaceError(InputError):
    """No frame of the picture holds a face."""

    code = "no_face"


class NoAudioError(InputError):
    """Sound was needed and there is none."""

    code = "no_audio"


class TextError(InputError):
    """Text that is empty or that the voice cannot say."""

    code = "text"


class OutputError(BeaverVisionError):
    """The result cannot be written."""

    code = "output"
    exit_code = 4


class ModelError(BeaverVisionError):
    """A model is missing, damaged or not allowed."""

    code = "model"
    exit_code = 5


class LicenceError(ModelError):
    """The model's licence was not accepted."""

    code = "licence"


class DeviceError(BeaverVisionError):
    """The device asked for is not there, or its memory is used up."""

    code = "device"
    exit_code = 6


class BusyError(BeaverVisionError):
    """No more live sessions, or no more sound, can be taken now: later, or less of it."""

    code = "busy"
    exit_code = 7


class Interrupted(BeaverVisionError):
    """Stopped by the user."""

    code = "interrupted"
    exit_code = 130
