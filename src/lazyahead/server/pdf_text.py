"""The text of a PDF, as a program of its own: what is wrong with a PDF, or too large in it, ends
this process and not the server. Imports nothing of lazyahead, so that it starts soon.

    python -P pdf_text.py MAX_PAGES MAX_CHARS MAX_BYTES < FILE

It prints a JSON object: `text` and `pages`, or `error`. MAX_BYTES is what it may take of memory.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings


class UnreadableError(Exception):
    """Nothing can be read; the message says why."""


def text_of(data: bytes, max_pages: int, max_chars: int) -> dict[str, object]:
    """Raises UnreadableError."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("the PDF asks for a password; save it without one")
        num_pages = len(reader.pages)
        if num_pages > max_pages:
            raise UnreadableError(
                f"the PDF has {num_pages} pages, more than the {max_pages} that this server reads"
            )
        texts: list[str] = []
        for page in reader.pages:
            texts.append(page.extract_text().strip())
            if sum(map(len, texts)) > max_chars:
                raise UnreadableError(
                    f"the PDF has more than the {max_chars} characters that this server takes"
                )
    except PyPdfError as error:
        raise UnreadableError(f"the PDF cannot be read: {error}") from None
    text = "\n\n".join(filter(None, texts)).encode("utf-8", "replace").decode()
    if not text:
        raise UnreadableError("the PDF has no text; if it is scanned, run OCR over it first")
    return {"text": text, "pages": num_pages}


def main() -> None:
    max_pages, max_chars, max_bytes = map(int, sys.argv[1:])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    except (ImportError, ValueError, OSError):  # not every system can
        pass
    warnings.simplefilter("ignore")
    logging.disable()  # pypdf complains of what it mends
    try:
        told = text_of(sys.stdin.buffer.read(), max_pages, max_chars)
    except UnreadableError as error:
        told = {"error": str(error)}
    except MemoryError:
        told = {"error": "the PDF takes more memory than this server allows"}
    except Exception as error:  # of a damaged file, pypdf raises what comes
        told = {"error": f"the PDF cannot be read ({type(error).__name__})"}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
