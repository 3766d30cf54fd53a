"""What is remembered between requests: a log of token sequences in one SQLite file per model and
tokenizer.

The trie is rebuilt from it, oldest answer first. The file holds token ids, so it is as private as
the answers are: it is readable by its owner only, and deleted records are overwritten.
"""

import os
import sqlite3
import sys
import time
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import NamedTuple, Self

from lazyahead.errors import MemoryFileError

_APPLICATION_ID = 0x6C7A6168  # "lzah"
_VERSION = 1
_BYTES_PER_TOKEN = 4
_PAGE = 64  # answers read at once

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    created REAL NOT NULL,
    num_tokens INTEGER NOT NULL,
    tokens BLOB NOT NULL
);
CREATE INDEX by_namespace ON answers (namespace, id, num_tokens);
CREATE TABLE usage (
    namespace TEXT PRIMARY KEY,
    num_answers INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL
);
CREATE TRIGGER added AFTER INSERT ON answers BEGIN
    INSERT INTO usage VALUES (new.namespace, 1, new.num_tokens)
    ON CONFLICT DO UPDATE
    SET num_answers = num_answers + 1, num_tokens = num_tokens + new.num_tokens;
END;
CREATE TRIGGER dropped AFTER DELETE ON answers BEGIN
    UPDATE usage SET num_answers = num_answers - 1, num_tokens = num_tokens - old.num_tokens
    WHERE namespace = old.namespace;
    DELETE FROM usage WHERE namespace = old.namespace AND num_answers = 0;
END;
"""


class Owner(NamedTuple):
    """Whose token ids these are, as fingerprints. None where it is not known: then it is not
    compared."""

    model: str | None = None
    tokenizer: str | None = None


class Record(NamedTuple):
    """One remembered answer, without its tokens; `created` in seconds since 1970."""

    id: int
    namespace: str
    created: float
    num_tokens: int


class Usage(NamedTuple):
    """What one namespace holds."""

    num_answers: int
    num_tokens: int


class AnswerLog:
    """The log at `path`, created where missing. Any thread may use it, and several processes at
    once.

    An answer is on disk when `append` returns; a process killed in the middle loses at most the
    answer being written. Each namespace holds at most `capacity_bytes` of tokens (4 bytes each),
    its oldest answers leave first.

    Raises MemoryFileError where the file is no such log, is damaged, or belongs to another model or
    tokenizer (token ids mean nothing elsewhere). Without a `model` an existing log is opened,
    whosever it is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        capacity_bytes: int = 64 << 20,
    ) -> None:
        self.path = Path(path)
        if model is None and not self.path.is_file():
            raise MemoryFileError(f"no answers log at {path}")
        self._given = Owner(model, tokenizer)
        self.max_tokens = max(1, capacity_bytes // _BYTES_PER_TOKEN)
        self._lock = RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(
                self.path, timeout=10.0, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise MemoryFileError(f"cannot open answers log {self.path}: {error}") from error
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise
        self._closing = weakref.finalize(self, self._db.close)

    @property
    def owner(self) -> Owner:
        """Whose the log is."""
        with self._errors_named():
            held = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        return Owner(held.get("model"), held.get("tokenizer"))

    def append(self, tokens: Sequence[int], namespace: str = "default") -> None:
        """Remember an answer. Empty ones are not kept, and of one above the capacity only the end
        is.

        Raises ValueError for a token id outside 0 to 2^32 - 1.
        """
        if not tokens:
            return
        blob = _pack(tokens[-self.max_tokens :])
        with self._transaction():
            self._db.execute(
                "INSERT INTO answers (namespace, created, num_tokens, tokens) VALUES (?, ?, ?, ?)",
                (namespace, time.time(), len(blob) // _BYTES_PER_TOKEN, blob),
            )
            self._drop_oldest(namespace)

    def answers(self, namespace: str = "default") -> Iterator[list[int]]:
        """All answers of a namespace, oldest first. What is added meanwhile comes too."""
        last = 0
        while True:
            with self._errors_named():
                rows = self._db.execute(
                    "SELECT id, num_tokens, tokens FROM answers "
                    "WHERE namespace = ? AND id > ? ORDER BY id LIMIT ?",
                    (namespace, last, _PAGE),
                ).fetchall()
            if not rows:
                return
            for last, num_tokens, blob in rows:
                if len(blob) != num_tokens * _BYTES_PER_TOKEN:
                    raise MemoryFileError(
                        f"answers log {self.path} is damaged: record {last}. Delete the file"
                    )
                yield _unpack(blob)

    def records(self, namespace: str | None = None) -> list[Record]:
        """What is held, oldest first, of one namespace or of all."""
        with self._errors_named():
            rows = self._db.execute(
                "SELECT id, namespace, created, num_tokens FROM answers "
                "WHERE ?1 IS NULL OR namespace = ?1 ORDER BY id",
                (namespace,),
            ).fetchall()
        return [Record(*row) for row in rows]

    def usage(self) -> dict[str, Usage]:
        """Namespaces and what each holds."""
        with self._errors_named():
            rows = self._db.execute(
                "SELECT namespace, num_answers, num_tokens FROM usage ORDER BY namespace"
            ).fetchall()
        return {
            namespace: Usage(num_answers, num_tokens) for namespace, num_answers, num_tokens in rows
        }

    def import_from(self, path: str | Path) -> int:
        """Add the answers of another log of the same model and tokenizer; returns how many. Raises
        MemoryFileError."""
        if Path(path).is_file() and self.path.samefile(path):
            raise MemoryFileError(f"cannot import {path} into itself")
        num_added = 0
        with AnswerLog(path) as other:
            other._check_owner(self.owner)
            for namespace in other.usage():
                for tokens in other.answers(namespace):
                    self.append(tokens, namespace)
                    num_added += 1
        return num_added

    def clear(self, namespace: str | None = None) -> int:
        """Delete the answers of one namespace, or all, from the disk too; returns how many."""
        with self._transaction():
            deleted = self._db.execute(
                "DELETE FROM answers WHERE ?1 IS NULL OR namespace = ?1", (namespace,)
            ).rowcount
        with self._errors_named():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return deleted

    def close(self) -> None:
        with self._lock:
            self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        with self._errors_named():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA secure_delete = ON")
        with self._transaction():
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._create()
            if self._db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                raise MemoryFileError(
                    f"{self.path} is an SQLite file but no answers log: choose another path"
                )
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version != _VERSION:
                raise MemoryFileError(
                    f"answers log {self.path} has version {version}, this library reads {_VERSION}"
                )
        self._check_owner(self._given)
        with self._transaction():
            known = [
                (key, value) for key, value in self._given._asdict().items() if value is not None
            ]
            self._db.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", known)

    def _check_owner(self, owner: Owner) -> None:
        for key, held, mine in zip(Owner._fields, self.owner, owner, strict=True):
            if None not in (held, mine) and held != mine:
                raise MemoryFileError(
                    f"answers log {self.path} belongs to {key} {held!r}, not {mine!r}: choose "
                    "another path"
                )

    def _create(self) -> None:
        for statement in _statements(_SCHEMA):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _drop_oldest(self, namespace: str) -> None:
        held = self._db.execute(
            "SELECT num_tokens FROM usage WHERE namespace = ?", (namespace,)
        ).fetchone()[0]
        excess = held - self.max_tokens
        if excess <= 0:
            return
        oldest = self._db.execute(
            "SELECT id, num_tokens FROM answers WHERE namespace = ? ORDER BY id", (namespace,)
        )
        last = 0
        for last, num_tokens in oldest:  # noqa: B007
            excess -= num_tokens
            if excess <= 0:
                break
        oldest.close()
        self._db.execute("DELETE FROM answers WHERE namespace = ? AND id <= ?", (namespace, last))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors_named():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise MemoryFileError(f"answers log {self.path}: {error}") from error


def _statements(script: str) -> Iterator[str]:
    """Split where SQLite says that a statement is complete (a trigger has semicolons inside)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _pack(tokens: Sequence[int]) -> bytes:
    """Four little-endian bytes a token."""
    try:
        values = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers from 0 to {2**32 - 1}") from error
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _unpack(blob: bytes) -> list[int]:
    values = array("I", blob)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
