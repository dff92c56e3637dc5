"""Content credentials: a signed statement in the file of who made it and that it is synthetic (C2PA 2).

Needs the extra c2pa. The key and certificate are the operator's; no time stamp is asked for, so that nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beavervision.errors import OutputError, UsageError
from beavervision.settings import Settings

ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
_SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


class Credentials:
    """Signs results.

    Raises:
        UsageError: the extra is missing, or the certificate and the key cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, algorithm: str) -> None:
        try:
            import c2pa
        except ImportError as error:
            raise UsageError("Content credentials need an extra: pip install 'beavervision[c2pa]'.") from error
        self._c2pa: Any = c2pa
        try:
            chain, private = certificate.expanduser().read_bytes(), key.expanduser().read_bytes()
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read: {error.strerror}. Correct serve_c2pa_cert.") from error
        try:
            info = c2pa.C2paSignerInfo(algorithm.encode(), chain, private, None)
            self._signer: Any = c2pa.Signer.from_info(info)
        except c2pa.C2paError as error:
            raise UsageError(
                f"serve_c2pa_cert and serve_c2pa_key cannot be used with {algorithm}: {error}. "
                "The first is the chain from the signing certificate upwards, the second its key, both in PEM."
            ) from error

    @classmethod
    def of(cls, settings: Settings) -> Credentials | None:
        """Those that the settings name; raises as the class."""
        if not settings.serve_c2pa_cert:
            return None
        return cls(Path(settings.serve_c2pa_cert), Path(settings.serve_c2pa_key), settings.serve_c2pa_alg)

    def sign(self, video: Path, signed: Path, version: str, model: str) -> None:
        """Write a signed copy of the finished file `video` to `signed`.

        Raises:
            OutputError: it cannot be signed or written.
        """
        agent = {"name": "BeaverVision", "version": version}
        manifest = {
            "claim_generator_info": [agent],
            "title": "Talking face",
            "assertions": [
                {
                    "label": "c2pa.actions",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": _SYNTHETIC,
                                "softwareAgent": agent,
                                "description": f"A face made to speak by the model {model}",
                            }
                        ]
                    },
                }
            ],
        }
        try:
            with self._c2pa.Builder(manifest) as builder:
                builder.sign_file(video, signed, self._signer)
        except (self._c2pa.C2paError, OSError) as error:
            signed.unlink(missing_ok=True)
            raise OutputError(f"The video cannot be signed: {error}. Check the certificate and the disk.") from error
