"""Faces that were uploaded once: what they are, whose, and what a worker found when it looked at them.

The files of an avatar are a storage group of its own: the upload, a picture of it, and what a worker found, which spares every
later job the first look. An avatar is ready as soon as its row has facts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Column, Double, Index, String, Table, delete, func, insert, select, update

from beavervision.serve.database import META, Database
from beavervision.serve.storage import Storage

_PREFIX = "avatar-"
SOURCE, LOOK, PICTURE = "in/source", "out/look.npz", "out/picture.jpg"
_AVATARS = Table(
    "avatars",
    META,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(100), nullable=False),
    Column("job_id", String(32), nullable=False),
    Column("created_s", Double, nullable=False),
    Column("facts", JSON(none_as_null=True)),
    Index("avatars_by_owner", "owner", "created_s"),
)


@dataclass(frozen=True, slots=True)
class AvatarRow:
    """An avatar. `job_id` is of the job that looks at it; `facts` are there once it is ready."""

    id: str
    owner: str
    name: str
    job_id: str
    created_s: float
    facts: dict[str, Any] | None

    @property
    def ready(self) -> bool:
        return self.facts is not None


class Avatars:
    """The avatars of a service, shared by its processes. Safe from many threads."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database, self._storage = database, storage

    def add(self, avatar_id: str, owner: str, name: str, job_id: str, upload: Path) -> AvatarRow:
        """Take over the file `upload`. Its job is to be queued afterwards.

        Raises:
            OutputError: it cannot be stored.
        """
        self._storage.put(upload, self.key(avatar_id, SOURCE))
        row = AvatarRow(avatar_id, owner, name, job_id, time.time(), None)
        try:
            with self._database.write() as connection:
                connection.execute(
                    insert(_AVATARS).values(
                        id=row.id, owner=row.owner, name=row.name, job_id=row.job_id, created_s=row.created_s
                    )
                )
        except BaseException:
            self._storage.remove(_PREFIX + avatar_id)
            raise
        return row

    def get(self, avatar_id: str) -> AvatarRow | None:
        with self._database.read() as connection:
            row = connection.execute(select(_AVATARS).where(_AVATARS.c.id == avatar_id)).first()
            return None if row is None else AvatarRow(**row._asdict())

    def list(self, owner: str) -> tuple[AvatarRow, ...]:
        """The avatars of `owner`, newest first."""
        query = select(_AVATARS).where(_AVATARS.c.owner == owner).order_by(_AVATARS.c.created_s.desc(), _AVATARS.c.id)
        with self._database.read() as connection:
            return tuple(AvatarRow(**row._asdict()) for row in connection.execute(query))

    def count(self, owner: str) -> int:
        with self._database.read() as connection:
            query = select(func.count()).select_from(_AVATARS).where(_AVATARS.c.owner == owner)
            return int(connection.execute(query).scalar_one())

    def ready(self, avatar_id: str, look: Path, picture: Path, facts: dict[str, Any]) -> bool:
        """Take over the files of a look; False if the avatar was removed meanwhile.

        Raises:
            OutputError: they cannot be stored.
        """
        self._storage.put(look, self.key(avatar_id, LOOK))
        self._storage.put(picture, self.key(avatar_id, PICTURE))
        with self._database.write() as connection:
            mine = _AVATARS.c.id == avatar_id
            if connection.execute(update(_AVATARS).where(mine).values(facts=facts)).rowcount:
                return True
        self._storage.remove(_PREFIX + avatar_id)
        return False

    def remove(self, avatar_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(_AVATARS).where(_AVATARS.c.id == avatar_id))
        self._storage.remove(_PREFIX + avatar_id)

    def remove_files(self, avatar_id: str) -> None:
        """Keep only the row: the look failed."""
        self._storage.remove(_PREFIX + avatar_id)

    def file(self, avatar_id: str, name: str) -> Path:
        """A local copy of SOURCE, LOOK or PICTURE, for reading only.

        Raises:
            FileNotFoundError: there is none, or no longer.
        """
        return self._storage.fetch(self.key(avatar_id, name))

    @staticmethod
    def key(avatar_id: str, name: str) -> str:
        return f"{_PREFIX}{avatar_id}/{name}"

    @staticmethod
    def id_of(group: str) -> str | None:
        """The avatar that a storage group belongs to."""
        return group.removeprefix(_PREFIX) if group.startswith(_PREFIX) else None
