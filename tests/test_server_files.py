"""What the page reads: PDF files and the example, over HTTP."""

import importlib.util
import sys
from io import BytesIO

import httpx
import pytest
from pdfs import pdf
from serving import serving, tiny_llm

from lazyahead import LLM
from lazyahead.server import files

pypdf = pytest.importorskip("pypdf")
DAMAGED = pdf("x").replace(b"/Kids", b"/Kidz").replace(b"xref", b"fref")


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm(), max_pdf_pages=3, max_prompt_chars=100) as server:
        yield server


def extract(server, data):
    return httpx.post(server.url + "/v1/extract", content=data, timeout=60)


def changed(data, change):
    """The PDF as pypdf writes it after a change."""
    writer = pypdf.PdfWriter(clone_from=BytesIO(data))
    change(writer)
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def test_the_text_of_all_pages_comes_back(server):
    told = extract(server, pdf("High tide", num_pages=2)).json()
    assert told == {"text": "High tide\n\nHigh tide", "pages": 2}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no PDF"),
        (b"plain text", "no PDF"),
        (b"%PDF-1.7 and nothing more", "cannot be read"),
        (DAMAGED, "PDF"),
        (pdf("x", num_pages=4), "4 pages, more than the 3"),
        (pdf("word " * 50), "more than the 100 characters"),
        (pdf(""), "run OCR"),
        (changed(pdf("x"), lambda writer: writer.encrypt("pass", algorithm="RC4-128")), "password"),
    ],
    ids=["empty", "text", "head", "damaged", "pages", "long", "scanned", "locked"],
)
def test_what_cannot_be_read_is_refused_in_words(server, data, words):
    answer = extract(server, data)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_pdf"
    assert words in answer.json()["error"]["message"]


def test_without_pypdf_the_remedy_is_named(server, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    answer = extract(server, pdf("x"))
    assert answer.status_code == 501
    assert "pip install 'lazyahead[pdf]'" in answer.json()["error"]["message"]


def test_a_pdf_that_takes_too_long_ends_its_process(monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(files, "_PROGRAM", sleeper)
    with serving(tiny_llm(), pdf_timeout_s=0.2) as server:
        answer = extract(server, pdf("x"))
    assert "took longer to read than 0.2 s" in answer.json()["error"]["message"]


def test_reading_a_pdf_loads_nothing_of_the_library():
    source = files._PROGRAM.read_text(encoding="utf-8")
    assert "import lazyahead" not in source
    assert "from lazyahead" not in source


def test_the_example_is_what_the_model_can_read(server):
    found = server.get("/v1/example").json()
    assert found["questions"]
    assert 256 < len(server.service.llm.tokenizer(found["text"])["input_ids"]) < 1024
    assert "with" in found["text"]


def test_the_reader_s_example_is_of_its_own_world():
    with serving(LLM()) as server:
        found = server.get("/v1/example").json()
    assert found["questions"][0].startswith("What are ")
    assert sys.getsizeof(found["text"]) > 10_000
