"""The database of a service: SQLite by default, PostgreSQL by URL.

SQLite is opened in WAL mode, and each transaction that writes begins with BEGIN IMMEDIATE. Columns that a later version
added are added to the tables of an earlier one; all such columns may be null.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection, MetaData, create_engine, event, inspect

META = MetaData()
_BUSY_S = 15  # how long a transaction waits for another process's


class Database:
    """Safe from many threads and processes.

    Args:
        url: as SQLAlchemy writes it.
    """

    def __init__(self, url: str) -> None:
        sqlite = url.startswith("sqlite")
        self._engine = create_engine(url, connect_args={"timeout": _BUSY_S} if sqlite else {}, pool_pre_ping=not sqlite)
        if sqlite:
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._reader = self._engine.execution_options(reading=True)
        META.create_all(self._engine)
        self._add_columns()

    def close(self) -> None:
        self._engine.dispose()

    def write(self) -> AbstractContextManager[Connection]:
        """A transaction, committed at the end of the block."""
        return self._engine.begin()

    def read(self) -> AbstractContextManager[Connection]:
        return self._reader.connect()

    def _add_columns(self) -> None:
        for table in META.sorted_tables:
            with self._reader.connect() as connection:
                there = {column["name"] for column in inspect(connection).get_columns(table.name)}
            for column in table.columns:
                if column.name not in there:
                    kind = column.type.compile(self._engine.dialect)
                    with self._engine.begin() as connection:
                        connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver is not to begin transactions by itself
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an accepted job outlives a power cut
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
