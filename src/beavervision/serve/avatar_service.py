"""What the API does with avatars, without HTTP."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from beavervision import metrics
from beavervision.serve.avatars import LOOK, PICTURE, SOURCE, AvatarRow
from beavervision.serve.jobs import Job, NewJob, State, new_id
from beavervision.serve.looks import load_choice
from beavervision.serve.problems import Problem, of_validation
from beavervision.serve.schema import AvatarOut, AvatarSettings, ErrorOut, time_of
from beavervision.serve.telemetry import current
from beavervision.serve.upload import Upload
from beavervision.stages.detect import FaceChoice

if TYPE_CHECKING:
    from beavervision.serve.service import Service


class AvatarService:
    """The avatars of one server process. Safe from many threads."""

    def __init__(self, service: Service) -> None:
        self._service, self._place, self._settings = service, service.place, service.settings

    def accept(self, upload: Upload, owner: str, address: str, idempotency_key: str | None) -> tuple[str, Job]:
        """Check what can be checked, keep the face, and queue the job that looks at it: the avatar's id and that job.

        Raises:
            Problem, BeaverVisionError: it is refused.
        """
        # Not the fingerprint that the same content has as a lip-sync request.
        fingerprint = hashlib.sha256(f"avatar {upload.fingerprint}".encode()).hexdigest()
        new = NewJob(new_id(), owner, {}, fingerprint, idempotency_key)
        earlier = self._service.earlier(new)
        if earlier is not None:
            return earlier.request["avatar"], earlier
        try:
            wanted = AvatarSettings(name=upload.fields.get("name", ""), face=upload.fields.get("face", "largest"))
        except ValidationError as error:
            raise of_validation(error, "form") from error
        consent = upload.consent
        if self._settings.serve_require_consent and not consent:
            raise Problem(
                422, "consent", "Confirm that you have the right to use this face: send the field consent=true."
            )
        video = upload.files.get("video")
        if video is None:
            raise Problem(422, "usage", "There is no face: send a video or a picture in the field video.")
        if self._place.avatars.count(owner) >= self._settings.serve_max_avatars:
            raise Problem(
                409, "avatars", f"There are {self._settings.serve_max_avatars} avatars already. Delete one first."
            )
        self._service.examine(video, None)
        avatar_id = new_id()
        request = {"kind": "avatar", "avatar": avatar_id, "face": wanted.face, "consent": consent, "trace": current()}
        self._place.avatars.add(avatar_id, owner, wanted.name or avatar_id, new.id, video)
        job: Job | None = None
        try:
            job = self._service.queue(replace(new, request=request))
        finally:
            if job is None or job.id != new.id:
                self._place.avatars.remove(avatar_id)
        if job.id != new.id:  # the same key came at the same moment
            return job.request["avatar"], job
        self._place.audit.write(
            "avatar", avatar=avatar_id, job=new.id, owner=owner, address=address, consent=consent,
            fingerprint=upload.fingerprint,
        )  # fmt: skip
        return avatar_id, job

    def get(self, avatar_id: str, owner: str) -> AvatarRow:
        """Raises Problem (404) if `owner` has no such avatar."""
        row = self._place.avatars.get(avatar_id)
        if row is None or row.owner != owner:
            raise Problem(404, "no_avatar", "There is no such avatar: it was deleted, or belongs to another key.")
        return row

    def usable(self, avatar_id: str, owner: str) -> AvatarRow:
        """An avatar that jobs may name.

        Raises:
            Problem: there is none (404), or it is not ready (409).
        """
        row = self.get(avatar_id, owner)
        if not row.ready:
            state = self.shown(row).state
            raise Problem(409, "avatar_not_ready", f"The avatar is {state}. Use one that is ready.")
        return row

    def source(self, avatar_id: str, owner: str) -> tuple[Path, FaceChoice]:
        """The local file of an avatar's video or picture, for reading only, and which face of it was found.

        Raises:
            Problem: as :meth:`usable`.
        """
        row = self.usable(avatar_id, owner)
        return self._file(row, SOURCE), load_choice(self._file(row, LOOK))

    def picture(self, avatar_id: str, owner: str) -> Path:
        """A small JPEG of it; raises as :meth:`usable`."""
        return self._file(self.usable(avatar_id, owner), PICTURE)

    def _file(self, row: AvatarRow, name: str) -> Path:
        try:
            return self._place.avatars.file(row.id, name)
        except FileNotFoundError as error:
            raise Problem(404, "no_avatar", "The avatar was deleted a moment ago.") from error

    def delete(self, avatar_id: str, owner: str) -> None:
        row = self.get(avatar_id, owner)
        if self._place.table.cancel(row.job_id):
            metrics.JOBS.labels(State.CANCELLED.value).inc()
            self._service.supervisor.news.told(row.job_id)
        self._place.avatars.remove(avatar_id)
        self._place.audit.write("avatar_deleted", avatar=avatar_id, owner=owner)

    def list(self, owner: str) -> list[AvatarOut]:
        return [self.shown(row) for row in self._place.avatars.list(owner)]

    def shown(self, row: AvatarRow) -> AvatarOut:
        job = None if row.ready else self._place.table.get(row.job_id)
        alive = job is not None and not job.ended
        error = None
        if not row.ready and not alive:
            message = "It was not looked at. Upload it again."
            error = ErrorOut(code="error", message=message)
            if job is not None and job.error_code is not None:
                error = ErrorOut(code=job.error_code, message=job.error_message or message)
        base = f"/api/v1/avatars/{row.id}"
        links = {"self": base}
        if row.ready:
            links["picture"] = f"{base}/picture"
        elif alive:
            links["job"] = f"/api/v1/jobs/{row.job_id}"
        facts = row.facts or {}
        return AvatarOut(
            id=row.id,
            name=row.name,
            state="ready" if row.ready else "preparing" if alive else "failed",
            created=time_of(row.created_s),
            kind=facts.get("kind"),
            width_px=facts.get("width_px"),
            height_px=facts.get("height_px"),
            seconds=facts.get("seconds"),
            people=facts.get("people"),
            face=facts.get("face"),
            error=error,
            links=links,
        )
