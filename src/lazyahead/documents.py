"""Documents that were read before any question, in a folder: one session file each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazyahead.cache.session import Session
from lazyahead.errors import ConfigError, SessionFileError
from lazyahead.hf.attach import dtype_name
from lazyahead.llm import LLM

_EVERYBODYS, _OWN = "shared", "own"


class DocumentStore:
    """A folder of documents, as one model and its prefill strategy have read them.

    A document of a namespace is found again by its tokens; those without one are for everybody.
    Raises ConfigError where the folder cannot be made, SessionFileError where sessions have no
    files.
    """

    def __init__(self, llm: LLM, folder: str | Path) -> None:
        llm.check_whole()
        self.folder = Path(folder)
        self._llm = llm
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from None

    def path(self, token_ids: Sequence[int], namespace: str | None = None) -> Path:
        """Where the document with this beginning is, or would be."""
        prefill = None if self._llm.prefill is None else self._llm.prefill.to_dict()
        owner = [namespace, prefill, f"torch.{dtype_name(self._llm.model)}", list(token_ids)]
        digest = hashlib.blake2b(json.dumps(owner).encode(), digest_size=16).hexdigest()
        kind = _EVERYBODYS if namespace is None else _OWN
        return self.folder / f"{kind}-{digest}.safetensors"

    def save(self, session: Session, namespace: str | None = None) -> Path:
        """Writes what `LLM.read_ahead` gave. Raises SessionFileError."""
        path = self.path(session.token_ids, namespace)
        self._llm.save_session(session, path)
        return path

    def load(self, token_ids: Sequence[int], namespace: str | None = None) -> Session | None:
        """The document with this beginning. None where it is not there, or was read by another
        model."""
        path = self.path(token_ids, namespace)
        try:
            return self._llm.load_session(path) if path.exists() else None
        except SessionFileError:
            return None

    def everybodys(self) -> Iterator[tuple[Path, Session | SessionFileError]]:
        """The documents without a namespace, or why one cannot be used."""
        for path in sorted(self.folder.glob(f"{_EVERYBODYS}-*.safetensors")):
            try:
                yield path, self._llm.load_session(path)
            except SessionFileError as error:
                yield path, error
