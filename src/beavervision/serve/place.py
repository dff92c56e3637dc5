"""Where a service keeps its things, as the server and its workers both open them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from beavervision.errors import OutputError, UsageError
from beavervision.serve.access import Audit
from beavervision.serve.avatars import Avatars
from beavervision.serve.bucket import BucketStorage
from beavervision.serve.jobs import JobTable
from beavervision.serve.storage import LocalStorage, Storage
from beavervision.settings import Settings


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told at its start. `name` is unique in the life of a database, `slot` in a server."""

    settings: Settings
    name: str
    slot: str


@dataclass(frozen=True, slots=True)
class Place:
    """`scratch` is for files that nobody needs after a restart; `workers` has what each worker tells of itself."""

    table: JobTable
    storage: Storage
    avatars: Avatars
    audit: Audit
    scratch: Path
    workers: Path

    @classmethod
    def open(cls, settings: Settings) -> Place:
        """Make the folders and the database where they are missing.

        Raises:
            OutputError: they cannot be made.
            UsageError: serve_database or serve_storage cannot be used.
        """
        root = settings.serve_folder
        scratch, workers = root / "scratch", root / "workers"
        try:
            for folder in (root, scratch, workers):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{root} cannot be made: {error.strerror}. Name another with BEAVERVISION_SERVE_FOLDER."
            ) from error
        url = settings.serve_database or f"sqlite:///{root.resolve() / 'jobs.sqlite'}"
        try:
            table = JobTable(url, attempts=settings.serve_attempts, lease_s=settings.serve_lease_s)
        except (SQLAlchemyError, ImportError) as error:
            raise UsageError(f"The database cannot be opened: {error}. Correct serve_database.") from error
        storage: Storage = LocalStorage(root / "files")
        if settings.serve_storage:
            storage = BucketStorage(settings.serve_storage, root / "files")
        avatars = Avatars(table.database, storage)
        return cls(table, storage, avatars, Audit(root / "audit.jsonl"), scratch, workers)
