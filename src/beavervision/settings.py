"""The only reader of the environment and of TOML.

Order of precedence: environment (``BEAVERVISION_<FIELD>``), then the file named by ``BEAVERVISION_CONFIG`` (default:
``beavervision/config.toml`` in the user's configuration folder), then the defaults below. Stages never see this object:
callers hand them plain arguments.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from beavervision.errors import UsageError

PREFIX = "BEAVERVISION_"
_POSITIVE = (
    "serve_workers",
    "serve_queue",
    "serve_attempts",
    "serve_lease_s",
    "serve_job_limit_s",
    "serve_max_upload_mb",
    "serve_max_text_chars",
    "serve_max_media_s",
    "serve_max_side_px",
    "serve_link_s",
    "serve_keep_hours",
    "serve_burst",
    "serve_max_avatars",
    "live_idle_s",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings with their defaults."""

    data_dir: Path = Path("~/.local/share/beavervision")  # imported models
    model: str = "beaver"  # the lip-sync model
    voice: str = ""  # empty: the default voice of the language
    language: str = "en"  # of the voice where none is named
    device: str = "auto"  # auto, cpu, cuda:0, or a comma-separated list
    threads: int = 0  # CPU threads to plan with; 0: as many as this process may use
    memory_threshold: float = 0.85  # share of a device's memory that may be used
    preset: str = "veryfast"  # x264 speed preset
    crf: int = 20  # x264 quality: 0 is best, 51 worst
    debug: bool = False  # show tracebacks of errors
    serve_host: str = "127.0.0.1"
    serve_port: int = 8000  # 0: any free one
    serve_folder: Path = Path("~/.local/share/beavervision/serve")  # database, uploads, results, audit log
    serve_database: str = ""  # an SQLAlchemy URL; empty: SQLite in serve_folder
    serve_workers: int = 1  # processes, each with one job at a time
    serve_workers_max: int = 0  # as many of them while jobs wait; 0: never more than serve_workers
    serve_idle_s: float = 120.0  # a worker beyond serve_workers ends when it had no job for so long
    serve_keys: str = ""  # a file of hashed API keys; empty: <serve_folder>/keys, if there is one
    serve_open: bool = False  # let anybody in who can reach serve_host; without keys only this machine may
    serve_secret: str = ""  # signs links to results; empty: made once and kept in serve_folder
    serve_public_url: str = ""  # how clients reach the service; empty: as they addressed it
    serve_cors_origins: str = ""  # web origins that may call the service, with commas between
    serve_require_consent: bool = True
    serve_allow_non_commercial: bool = False
    serve_wait_s: float = 30.0  # the longest that a request waits for its result
    serve_queue: int = 64  # jobs that may wait
    serve_attempts: int = 3  # how often a job is begun
    serve_lease_s: float = 15.0  # a worker silent for so long loses its job
    serve_job_limit_s: float = 3600.0  # the longest that one attempt may take
    serve_drain_s: float = 60.0  # how long running jobs may go on after SIGTERM
    serve_rate_per_s: float = 0.0  # requests of one key, or without keys of one address; 0: no limit
    serve_burst: int = 20  # of them at once
    serve_daily_media_s: float = 0.0  # of video made for one key in 24 hours; 0: no limit
    serve_max_avatars: int = 100  # of one key
    serve_webhook_hosts: str = (
        ""  # hosts that webhooks may reach without TLS or at a private address, with commas between
    )
    serve_storage: str = ""  # gs://BUCKET/FOLDER; empty: local files in serve_folder
    serve_otlp: str = ""  # where traces go by OTLP over HTTP, as http://localhost:4318; empty: nowhere
    serve_log: str = "text"  # or json: one document a line, as Cloud Logging reads it
    serve_c2pa_cert: str = ""  # a PEM file with a certificate chain: results carry content credentials
    serve_c2pa_key: str = ""  # a PEM file with the certificate's key
    serve_c2pa_alg: str = "es256"  # es256, es384, es512, ps256, ps384, ps512 or ed25519, as the key is
    serve_mark: bool = False  # every result says visibly that it is synthetic
    live_sessions: int = 0  # live sessions at once; 0: as many as this machine can carry
    live_idle_s: float = 60.0  # a session that nobody watches or speaks through for so long ends
    live_udp_hosts: str = ""  # addresses of this machine that WebRTC may use, with commas between; empty: all
    live_public_host: str = ""  # the address of a router that forwards UDP to this machine
    live_ice_servers: str = ""  # stun:HOST:PORT and turn:HOST:PORT?transport=udp, with commas between
    live_turn_user: str = ""
    live_turn_password: str = ""
    live_turn_secret: str = (
        ""  # makes users and passwords that expire, as coturn's static-auth-secret; instead of those two
    )
    live_push_hosts: str = ""  # hosts that sessions may be pushed to by RTMP, with commas between; *: any
    serve_max_upload_mb: int = 512
    serve_max_text_chars: int = 10_000
    serve_max_media_s: float = 600.0
    serve_max_side_px: int = 8192
    serve_link_s: float = 3600.0  # how long a link to a result is valid
    serve_keep_hours: float = 24.0  # how long ended jobs and their results are kept

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment and the file.

        Raises:
            UsageError: an unknown key, or a value of the wrong kind; the message names it.
        """
        env = os.environ if env is None else env
        base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME", "~")) / ".config")
        named = env.get(PREFIX + "CONFIG")
        path = Path(named or Path(base) / "beavervision" / "config.toml").expanduser()
        values: dict[str, Any] = {}
        if path.is_file():
            try:
                values = tomllib.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise UsageError(
                    f"{path} cannot be read: {error.strerror}. Correct its rights or remove it."
                ) from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{path} is not valid TOML: {error}. Correct or remove it.") from error
        elif named:
            raise UsageError(f"{PREFIX}CONFIG names {path}, which does not exist.")
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise UsageError(f"{path}: unknown setting {unknown[0]!r}. Known: {', '.join(known)}.")
        for name in known:
            if PREFIX + name.upper() in env:
                values[name] = env[PREFIX + name.upper()]
        return cls(**{name: _typed(name, value, getattr(cls(), name)) for name, value in values.items()})

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser())
        object.__setattr__(self, "serve_folder", self.serve_folder.expanduser())
        if not 0 < self.memory_threshold <= 1:
            raise UsageError(f"memory_threshold is a share between 0 and 1, not {self.memory_threshold}.")
        for url in filter(None, (url.strip() for url in self.live_ice_servers.split(","))):
            if not url.startswith(("stun:", "turn:", "turns:")):
                raise UsageError(f"live_ice_servers: {url!r} is no server. Write stun:HOST:PORT or turn:HOST:PORT.")
        if self.live_sessions < 0:
            raise UsageError(f"live_sessions must be 0 or more, not {self.live_sessions}.")
        if self.threads < 0:
            raise UsageError(f"threads must be 0 or more, not {self.threads}.")
        if not 0 <= self.crf <= 51:
            raise UsageError(f"crf is a number from 0 (best) to 51 (worst), not {self.crf}.")
        if not 0 <= self.serve_port <= 65535:
            raise UsageError(f"serve_port is a number from 0 to 65535, not {self.serve_port}.")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0, not {getattr(self, name)}.")
        if self.serve_log not in ("text", "json"):
            raise UsageError(f"serve_log is text or json, not {self.serve_log!r}.")
        if bool(self.serve_c2pa_cert) != bool(self.serve_c2pa_key):
            raise UsageError("serve_c2pa_cert and serve_c2pa_key belong together: set both or none.")
        if 0 != self.serve_workers_max < self.serve_workers:
            raise UsageError(
                f"serve_workers_max is 0, or no less than serve_workers ({self.serve_workers}); not {self.serve_workers_max}."
            )
        for name in ("serve_wait_s", "serve_drain_s", "serve_idle_s", "serve_rate_per_s", "serve_daily_media_s"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}.")

    @property
    def most_workers(self) -> int:
        """How many workers a server has at the most."""
        return max(self.serve_workers, self.serve_workers_max)

    @property
    def voices_dir(self) -> Path:
        """Where voice files beside the bundled one are looked for."""
        return self.data_dir / "voices"

    def voice_for(self, voice: str | None, language: str | None) -> tuple[str | None, str | None]:
        """The voice and language to use where a caller asks for these two: what is asked for replaces both defaults."""
        if voice or language:
            return voice, language
        return (self.voice, None) if self.voice else (None, self.language)


def _typed(name: str, value: Any, default: Any) -> Any:
    kind = Path if isinstance(default, Path) else type(default)
    if isinstance(value, str):
        try:
            if kind is bool:
                return ("0", "1", "false", "true").index(value.lower()) % 2 == 1
            return kind(value)
        except ValueError as error:
            raise UsageError(f"setting {name}: {value!r} is no {kind.__name__}.") from error
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise UsageError(f"setting {name}: {value!r} is no {kind.__name__}.")
