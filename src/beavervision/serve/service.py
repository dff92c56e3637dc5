"""What the API does, without HTTP: who may come in, and what becomes of a request for a job."""

from __future__ import annotations

import base64
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beavervision import metrics
from beavervision.errors import LicenceError, UsageError
from beavervision.expression import ExpressionStore, Marked, Style, Track
from beavervision.expression import known as known_expressions
from beavervision.expression import parse as parse_expression
from beavervision.media import F32
from beavervision.models.cards import BEAVER, CARDS, ModelCard
from beavervision.models.store import ModelStore
from beavervision.serve import exposition, telemetry
from beavervision.serve.access import KeyRing, Keys, Links, is_loopback, key_file, secret
from beavervision.serve.avatar_service import AvatarService
from beavervision.serve.credentials import Credentials
from beavervision.serve.guard import Guard, Limits
from beavervision.serve.jobs import Job, KeyReusedError, NewJob, QueueFullError, State, new_id
from beavervision.serve.limits import Allowance, Buckets
from beavervision.serve.place import Place
from beavervision.serve.preview import Previewer
from beavervision.serve.problems import Problem, of_validation
from beavervision.serve.schema import (
    ExpressionOut,
    JobOut,
    LimitsOut,
    LipsyncSettings,
    ModelOut,
    PhoneTime,
    SpeechOut,
    SpeechRequest,
    StatusOut,
    VoiceOut,
    VoiceSettings,
    WorkerOut,
    job_out,
)
from beavervision.serve.supervisor import Supervisor
from beavervision.serve.upload import Upload
from beavervision.serve.version import program_version
from beavervision.serve.webhooks import Target, Webhooks, secret_of
from beavervision.settings import Settings
from beavervision.speech import Phone, Speaker, SpeechChunk, phones_of, write_wav

_EXAMINED_AT_ONCE = 2
_SPEECH_WAIT_S = 10.0
_KINDS = {"lipsync": "model", "restore": "face restorer", "boxes": "face detector"}
_FREE_BYTES = 256 << 20  # of disk, beyond the largest upload
_RETRY_S = (1, 600)  # the least and the most that a client is told to wait
_RETRY_UNKNOWN_S = 10


class Service:
    """The state of one server process. Safe from many threads.

    Raises:
        UsageError: it would be open to other machines without keys; a setting cannot be used.
        ModelError: the default voice needs something that is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self._ring = KeyRing(key_file(settings), required=bool(settings.serve_keys))
        if self.keys is None and not settings.serve_open and not is_loopback(settings.serve_host):
            raise UsageError(
                f"On {settings.serve_host} other machines can reach the service, and it has no API keys. Make one with "
                "`beavervision serve --new-key NAME`, or let everybody in with BEAVERVISION_SERVE_OPEN=1."
            )
        self.settings = settings
        usable = [model.name for model in self.models() if model.usable and model.kind == "lipsync"]
        if settings.model not in usable:
            raise UsageError(
                f"The default model {settings.model!r} cannot be used here. Set one of: {', '.join(usable)}."
            )
        self._speaker = Speaker(threads=1, voices_dir=settings.voices_dir)
        self._speaker.voice(*settings.voice_for(None, None))
        Credentials.of(settings)  # to find out now what is wrong with them
        self.traces = telemetry.Traces(settings, "server")
        self.place = Place.open(settings)
        self.links = Links(secret(settings), settings.serve_link_s)
        self.supervisor = Supervisor(settings, self.place)
        self.guard = Guard()
        self.previewer = Previewer()
        self.avatars = AvatarService(self)
        self.webhooks = Webhooks(
            self.place.table, self.place.audit, self.links.secret, self._webhook_hosts(), self._webhook_payload
        )
        self.buckets = Buckets()
        self.draining = threading.Event()
        self._speaking = threading.BoundedSemaphore(1)
        self._examining = threading.BoundedSemaphore(_EXAMINED_AT_ONCE)
        self._began_s = time.monotonic()

    def start(self) -> None:
        """Start the processes and threads beside this one."""
        self.supervisor.start()
        self.guard.start()
        self.webhooks.start()

    def drain(self) -> None:
        """Take no new job; let those at work end."""
        self.draining.set()
        self.supervisor.drain()

    def close(self) -> None:
        self.webhooks.stop()
        self.supervisor.stop()
        self.guard.close()
        self.previewer.close()
        self.traces.close()
        self.place.table.close()

    # Jobs ----------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Raises Problem (503, with Retry-After) if no job can be taken now."""
        if self.draining.is_set():
            raise Problem(
                503, "draining", "The service is being stopped. Try again in a moment.", headers={"Retry-After": "10"}
            )
        if self.place.table.counts()[State.QUEUED] >= self.settings.serve_queue:
            raise self.full()
        free = shutil.disk_usage(self.settings.serve_folder).free
        if free < _FREE_BYTES + (self.settings.serve_max_upload_mb << 20):
            raise Problem(
                503, "storage", "The service is short of disk space. Try again later.", headers={"Retry-After": "600"}
            )

    @property
    def keys(self) -> Keys | None:
        """None where everybody may come in who can reach the service."""
        return self._ring.keys

    def allowance(self, owner: str) -> Allowance:
        """How much `owner` may ask for."""
        s = self.settings
        general = Allowance(s.serve_rate_per_s, s.serve_burst, s.serve_daily_media_s)
        keys = self.keys
        return general if keys is None else keys.allowance(owner, general)

    def _check_quota(self, owner: str) -> None:
        allowed_s = self.allowance(owner).daily_media_s
        if allowed_s <= 0:
            return
        used_s, free_s = self.place.table.used(owner)
        if used_s >= allowed_s:
            wait_s = max(1, math.ceil(free_s - time.time()))
            detail = (
                f"{used_s:.0f} s of video were made in 24 hours; {allowed_s:g} s are allowed. Try again in {wait_s} s."
            )
            raise Problem(429, "quota", detail, headers={"Retry-After": str(wait_s)})

    def full(self) -> Problem:
        """That the queue is full, and when to try again."""
        mean_s = self.place.table.figures().work_mean_s
        wait_s = _RETRY_UNKNOWN_S if mean_s is None else round(mean_s / self.settings.most_workers)
        wait_s = min(max(wait_s, _RETRY_S[0]), _RETRY_S[1])
        detail = f"The queue is full: {self.settings.serve_queue} may wait. Try again in {wait_s} s."
        return Problem(503, "queue_full", detail, headers={"Retry-After": str(wait_s)})

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the time of a request.

        Raises:
            Problem: there is no space for it.
        """
        try:
            folder = Path(tempfile.mkdtemp(prefix="request-", dir=self.place.scratch))
        except OSError as error:
            raise Problem(507, "storage", "Nothing can be stored: no space is left. Try again later.") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def accept(
        self, upload: Upload, owner: str, address: str, idempotency_key: str | None, public_url: str = ""
    ) -> Job:
        """Check everything that can be checked, and queue the job. Its files are taken over.

        `public_url` is how the client addressed the service.

        Raises:
            Problem, BeaverVisionError: it is refused.
        """
        new = NewJob(new_id(), owner, {}, upload.fingerprint, idempotency_key)
        earlier = self.earlier(new)
        if earlier is not None:
            return earlier
        try:
            settings = LipsyncSettings.model_validate_json(upload.fields.get("settings") or "{}")
        except ValidationError as error:
            raise of_validation(error, "settings") from error
        video, audio, text = upload.files.get("video"), upload.files.get("audio"), upload.fields.get("text")
        avatar = upload.fields.get("avatar")
        consent = upload.consent
        self._check_quota(owner)
        given_before = avatar is not None and audio is None  # with the avatar
        if self.settings.serve_require_consent and not consent and not given_before:
            raise Problem(
                422,
                "consent",
                "Confirm that you have the right to use this face and voice: send the field consent=true.",
            )
        if (video is None) == (avatar is None):
            raise Problem(
                422,
                "usage",
                "Say whose face it is: send a video or a picture in the field video, or the id of an avatar in the field avatar.",
            )
        if avatar is not None:
            avatar = self.avatars.usable(avatar, owner).id
            if "face" in settings.model_fields_set:
                raise Problem(422, "usage", "The face of an avatar was chosen when it was uploaded. Leave out face.")
        if (audio is None) == (text is None):
            raise Problem(
                422, "usage", "Say what the face should speak: send exactly one of the fields text and audio."
            )
        settings = self._understood(settings)
        self._check_phones(settings, audio is not None)
        if text is not None:
            self._check_text(text, settings)
        if settings.model is not None:
            self.check_model(settings.model)
        if settings.restore is not None:
            self.check_model(settings.restore, "restore")
        if settings.boxes is not None:
            self.check_model(settings.boxes, "boxes")
        if (settings.boxes or settings.whole_box) and (settings.model or self.settings.model) == BEAVER.name:
            raise Problem(
                422,
                "usage",
                f"boxes and whole_box are for Wav2Lip models; {BEAVER.name} draws without. Leave them out.",
            )
        hook = upload.fields.get("webhook")
        if hook is not None:
            Target.of(hook, self._webhook_hosts())
        self.examine(video, audio)
        request = {
            "public_url": public_url,
            "trace": telemetry.current(),
            "avatar": avatar,
            "settings": settings.model_dump(exclude_none=True),
            "text": text,
            "audio": audio is not None,
            "consent": consent,
        }
        new = NewJob(new.id, owner, request, upload.fingerprint, idempotency_key, hook)
        job = self._queue(new, upload)
        if job.id == new.id:
            self.place.audit.write(
                "accepted",
                job=job.id,
                owner=owner,
                address=address,
                consent=consent,
                fingerprint=upload.fingerprint,
                text=text is not None,
            )
        return job

    def examine(self, video: Path | None, audio: Path | None) -> None:
        """Raises MediaError or NoAudioError if one of the files cannot be used, or not within the limits."""
        limits = Limits(self.settings.serve_max_side_px, self.settings.serve_max_media_s)
        if video is not None or audio is not None:
            with self._examining:
                self.guard.examine(video, audio, limits)

    def earlier(self, new: NewJob) -> Job | None:
        """The job that came with the idempotency key of `new`; raises Problem where that was for something else."""
        try:
            return self.place.table.by_key(new)
        except KeyReusedError as error:
            raise _reused() from error

    def queue(self, new: NewJob) -> Job:
        """Queue a job, or find the one that came with the same idempotency key; raises Problem."""
        try:
            job, queued = self.place.table.add(new, self.settings.serve_queue)
        except QueueFullError as error:
            raise self.full() from error
        except KeyReusedError as error:
            raise _reused() from error
        if queued:
            self.supervisor.wake()
        return job

    def _queue(self, new: NewJob, upload: Upload) -> Job:
        job: Job | None = None
        try:
            for name, path in upload.files.items():
                self.place.storage.put(path, f"{new.id}/in/{name}")
            job = self.queue(new)
            return job
        finally:
            if job is None or job.id != new.id:
                self.place.storage.remove(new.id)

    def _check_text(self, text: str, settings: LipsyncSettings) -> None:
        if len(text) > self.settings.serve_max_text_chars:
            limit = f"{self.settings.serve_max_text_chars} characters"
            raise Problem(
                422, "text", f"The text has {len(text)} characters; {limit} are allowed. Split it into parts."
            )
        self._chunks(self._spoken(text), settings)

    def _understood(self, settings: LipsyncSettings) -> LipsyncSettings:
        """The settings, their style without fields that nobody knows; raises BeaverVisionError where the worker could not
        understand what the face is to express."""
        custom = ExpressionStore(self.settings.data_dir).looks()
        if settings.expression is not None:
            parse_expression(settings.expression, custom)
        if settings.expression_track is not None:
            Track.of([key.model_dump() for key in settings.expression_track], custom)
        if settings.style is None:
            return settings
        return settings.model_copy(update={"style": Style.of(settings.style).as_dict()})

    def _check_phones(self, settings: LipsyncSettings, recorded: bool) -> None:
        """Raises BeaverVisionError where the worker could not lead the lips by them."""
        if settings.phones is None:
            return
        if not recorded:
            raise Problem(
                422, "usage", "phones are those of recorded speech: send audio with them. A text's are known."
            )
        phones_of([phone.model_dump() for phone in settings.phones])

    def look(self, expression: str) -> F32:
        """The look (58,) that `expression` asks for; raises UsageError where it is not understood."""
        return parse_expression(expression, ExpressionStore(self.settings.data_dir).looks()).look

    def _spoken(self, text: str) -> str:
        """A text without its marks of expressions."""
        return Marked.of(text, ExpressionStore(self.settings.data_dir).looks()).text

    def check_model(self, name: str, kind: str = "lipsync") -> None:
        """Raises LicenceError or Problem (422) where this service does not draw with it."""
        model = next((m for m in self.models() if m.name == name), None)
        usable = [m.name for m in self.models() if m.usable and m.kind == kind]
        use = f"Use one of: {', '.join(usable)}." if usable else "Leave it out: this service has none."
        if model is not None and model.non_commercial and not self.settings.serve_allow_non_commercial:
            raise LicenceError(f"The model {name} may not be used commercially. {use}")
        if name not in usable:
            raise Problem(422, "model", f"There is no {_KINDS[kind]} {name!r} here. {use}")

    def job(self, job_id: str, owner: str) -> Job:
        """Raises Problem (404) if `owner` has no such job."""
        job = self.place.table.get(job_id)
        if job is None or job.owner != owner:
            raise no_job()
        return job

    def cancel(self, job_id: str, owner: str) -> Job:
        job = self.job(job_id, owner)
        if self.place.table.cancel(job_id):
            if job.request.get("kind") == "avatar":
                self.place.avatars.remove(job.request["avatar"])
            self.place.storage.remove(job_id)
            metrics.JOBS.labels(State.CANCELLED.value).inc()
            self.place.audit.write("cancelled", job=job_id, owner=owner)
            self.supervisor.news.told(job_id)
        return self.job(job_id, owner)

    def delete(self, job_id: str, owner: str) -> None:
        self.cancel(job_id, owner)
        self.place.table.remove(job_id)
        self.place.storage.remove(job_id)
        self.place.audit.write("deleted", job=job_id, owner=owner)

    def result(self, job: Job) -> Path:
        """The video of a job.

        Raises:
            Problem: it has none.
        """
        if job.result_key is None:
            raise Problem(409, "no_result", f"The job is {job.state}: it has no result. Look at its resource.")
        try:
            return self.place.storage.fetch(job.result_key)
        except FileNotFoundError as error:
            raise Problem(410, "gone", "The result has expired. Send the job again.") from error

    def shown(self, job: Job, public_url: str) -> JobOut:
        """A job as clients see it; `public_url` is how they address the service."""
        base = f"/api/v1/jobs/{job.id}"
        if job.result_key is None:
            return job_out(job, base, None, None)
        query, expires_s = self.links.sign(f"{base}/result")
        public = (self.settings.serve_public_url or public_url).rstrip("/")
        return job_out(job, base, f"{public}{base}/result?{query}", expires_s)

    # Webhooks ------------------------------------------------------------------------------------

    def webhook_secret(self, owner: str) -> str:
        return secret_of(self.links.secret, owner)

    def _webhook_hosts(self) -> frozenset[str]:
        return frozenset(host.strip() for host in self.settings.serve_webhook_hosts.split(",") if host.strip())

    def _webhook_payload(self, job: Job) -> dict[str, Any]:
        data = self.shown(job, job.request.get("public_url", "")).model_dump(mode="json")
        return {"type": f"job.{job.state}", "timestamp": data["ended"], "data": data}

    # Speech --------------------------------------------------------------------------------------

    def _chunks(self, text: str, settings: VoiceSettings) -> Iterator[SpeechChunk]:
        chosen = self._speaker.voice(*self.settings.voice_for(settings.voice, settings.language))
        return self._speaker.speak(
            text, voice=chosen.name, speed=settings.speed, pitch=settings.pitch, seed=settings.seed
        )

    def speak(self, request: SpeechRequest) -> SpeechOut:
        """A text as sound, with the times of its phones."""
        chosen = self._speaker.voice(*self.settings.voice_for(request.voice, request.language))
        chunks = self._chunks(self._spoken(request.text), request)
        phones: list[Phone] = []
        dropped: list[str] = []

        def noted() -> Iterator[SpeechChunk]:
            for chunk in chunks:
                phones.extend(chunk.phones)
                dropped.extend(chunk.dropped)
                yield chunk

        if not self._speaking.acquire(timeout=_SPEECH_WAIT_S):
            raise Problem(
                503, "busy", "Others are being spoken to. Try again in a moment.", headers={"Retry-After": "5"}
            )
        try:
            with self.scratch() as folder:
                samples = write_wav(noted(), folder / "speech.wav")
                sound = (folder / "speech.wav").read_bytes()
        finally:
            self._speaking.release()
        return SpeechOut(
            voice=chosen.name,
            language=chosen.language,
            licence=chosen.licence,
            rate_hz=chosen.rate_hz,
            seconds=round(samples / chosen.rate_hz, 3),
            left_out="".join(dict.fromkeys(dropped)),
            timing=chosen.timing.value,
            phones=[PhoneTime(**asdict(phone)) for phone in phones],
            audio_base64=base64.b64encode(sound).decode(),
        )

    def voices(self) -> list[VoiceOut]:
        return [VoiceOut(**(asdict(voice) | {"timing": voice.timing.value})) for voice in self._speaker.voices()]

    # What there is -------------------------------------------------------------------------------

    def expressions(self) -> list[ExpressionOut]:
        custom = ExpressionStore(self.settings.data_dir).looks()
        return [ExpressionOut(**asdict(name)) for name in known_expressions(custom)]

    def models(self) -> list[ModelOut]:
        stored = [model.card for model in ModelStore(self.settings.data_dir).list()]
        allow = self.settings.serve_allow_non_commercial
        names = {card.name for card in stored}
        cards = [(card, card.name == BEAVER.name) for card in CARDS if card.name not in names]
        cards += [(card, allow or not card.non_commercial) for card in stored]
        return [_model_out(card, usable) for card, usable in cards]

    def status(self, sessions: int) -> StatusOut:
        counts, figures = self.place.table.counts(), self.place.table.figures()
        return StatusOut(
            version=program_version(),
            uptime_s=round(time.monotonic() - self._began_s, 1),
            draining=self.draining.is_set(),
            workers=[
                WorkerOut(name=w.slot, pid=w.pid, ready=w.ready, restarts=w.restarts) for w in self.supervisor.workers()
            ],
            memory=exposition.memory(self.place.workers),
            sessions=sessions,
            queued=counts[State.QUEUED],
            running=counts[State.RUNNING],
            succeeded=figures.succeeded,
            failed=figures.failed,
            cancelled=figures.cancelled,
            processed_hours=round(figures.processed_hours, 6),
            success_rate=figures.success_rate,
            response_p50_s=figures.response_p50_s,
            response_p95_s=figures.response_p95_s,
            free_disk_bytes=shutil.disk_usage(self.settings.serve_folder).free,
            limits=LimitsOut(
                upload_mb=self.settings.serve_max_upload_mb,
                text_chars=self.settings.serve_max_text_chars,
                media_s=self.settings.serve_max_media_s,
                side_px=self.settings.serve_max_side_px,
                keep_hours=self.settings.serve_keep_hours,
                consent=self.settings.serve_require_consent,
            ),
        )


def no_job() -> Problem:
    return Problem(404, "no_job", "There is no such job: it was deleted, has expired, or belongs to another key.")


def _reused() -> Problem:
    return Problem(
        422, "idempotency", "This Idempotency-Key came with another request before. Use a new key for a new request."
    )


def _model_out(card: ModelCard, usable: bool) -> ModelOut:
    return ModelOut(
        name=card.name,
        kind=card.kind,
        summary=card.summary,
        licence_code=card.licence_code,
        licence_weights=card.licence_weights,
        non_commercial=card.non_commercial,
        usable=usable,
    )
