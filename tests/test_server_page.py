"""The page at `/`, in a real browser."""

import json
import random

import pytest
from browser import Tab, browser
from pdfs import pdf
from serving import serving, tiny_llm

from lazyahead.server.page import SCRIPTS, page

DOCUMENT = "The harbour of Port Ellen opens at nine. " * 12 + "\n\nThe <b>ferry</b> sails at noon."
QUESTION = "When does the harbour open?"
KEY = "a-secret-key"


def long_answer(num_tokens: int) -> tuple[str, str]:
    """A document of so many tokens, and the stream of an answer to which some of them came back."""
    rng = random.Random(0)
    words = [f" word{rng.randrange(99)}" for _ in range(num_tokens)]
    depth = [rng.choice((20, 30)) for _ in words]
    stats = {
        "prompt_tokens": num_tokens,
        "cached_tokens": 0,
        "answer_tokens": 2,
        "prompt_tokens_computed": 0.8,
        "revived": 1,
        "tokens_per_step": 1.0,
        "tokens_per_s": 9.0,
        "ttft_ms": 1.0,
    }
    reading = {"num_layers": 30, "tokens": ["user", "\n", *words], "depth": [30, 30, *depth]}
    back = {"positions": [2 + depth.index(20), 2 + num_tokens - 1], "depth": [30, 30]}
    details = [{"reading": reading}, {"revived": back}]
    events = [
        {
            "index": 0,
            "delta": {},
            "finish_reason": None,
            "lazyahead": {"spans": [{"text": " yes", "source": "model"}], "stats": stats, **detail},
        }
        for detail in details
    ]
    stream = [json.dumps({"choices": [event]}) for event in events]
    return "".join(words), "".join(f"data: {line}\n\n" for line in [*stream, "[DONE]"])


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm()) as server:
        yield server


@pytest.fixture
def tab(chromium, server):
    tab = Tab(chromium, server.url)
    yield tab
    tab.context.close()
    assert not tab.complaints
    assert all(url.startswith((server.url, "data:")) for url in tab.requests)


def test_the_page_is_one_response_that_runs_nothing_but_its_own_script():
    policy = page().headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert page().html.count("<script") == 1
    assert "/*script*/" not in page().html
    assert "src=" not in page().html.split("<script")[0]
    assert all(f"// {words}" in page().html for words in ("The conversation", "The page as"))
    assert len(SCRIPTS) == len(set(SCRIPTS))


def test_an_answer_streams_in_beside_its_figures_and_the_document_shows_how_it_was_read(tab):
    tab.open(DOCUMENT)
    assert "<b>ferry</b>" in tab.text("#text")
    tab.ask(QUESTION, longest="128")
    tab.page.wait_for_selector(".words.writing")
    tab.until_answered()
    figures = tab.text(".figures")
    for name in ("First token", "Tokens a second", "Share read", "From cache", "Tokens a step"):
        assert name in figures
    assert tab.text("#text") == DOCUMENT
    assert tab.count("#text .l4")
    assert "read through all" in tab.text("#depths")
    assert tab.text("#live").strip()


def test_what_came_back_is_marked_and_drafted_words_name_their_source(tab):
    tab.open(DOCUMENT)
    tab.ask(QUESTION)
    tab.until_answered()
    assert tab.count("#text .mark")
    assert "came back" in tab.text("#returned")
    tab.page.click("#next")
    assert tab.count("#text .here") == 1
    drafted = tab.page.locator(".words .from")
    assert drafted.count()
    assert "drafted from" in drafted.first.get_attribute("title")


def test_a_second_question_is_asked_behind_the_first_and_the_document_comes_first(tab):
    bodies = []
    tab.page.on("request", lambda request: bodies.append(request.post_data_json or {}))
    tab.open(DOCUMENT)
    for _ in range(2):
        tab.ask(QUESTION)
        tab.until_answered()
    first, second = [body["messages"] for body in bodies if "messages" in body]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert first[0] == second[0]
    assert first[0]["content"] == f"{DOCUMENT}\n\n{QUESTION}"


def test_escape_cancels_and_nothing_goes_on_in_the_server(tab, server):
    tab.open(DOCUMENT)
    tab.ask(QUESTION, longest="512")
    tab.page.wait_for_selector(".words.writing")
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector(".after:has-text('Cancelled')")
    server.until_idle()
    assert tab.page.evaluate("document.activeElement.id") == "question"


def test_comparing_answers_once_more_with_everything_read(tab):
    tab.open(DOCUMENT)
    tab.ask(QUESTION, by="#compare")
    tab.page.wait_for_selector(".verdict", timeout=60_000)
    assert tab.count(".answers.two .answer") == 2
    assert "100 %" in tab.text(".answers.two .answer:last-child .figures")
    assert not tab.count(".answers.two .answer:last-child .from")
    assert "First token" in tab.text(".verdict")


def test_a_reload_keeps_document_reading_and_conversation_until_they_are_cleared(tab):
    tab.open(DOCUMENT)
    tab.ask(QUESTION)
    tab.until_answered()
    selectors = ("#text", ".words", ".figures", "#depths", "#exchanges h2")
    before = [tab.text(selector) for selector in selectors]
    tab.page.reload()
    tab.page.wait_for_selector("#text .l4")
    assert [tab.text(selector) for selector in selectors] == before
    tab.page.click("#clear")
    tab.page.click("#notice button")
    assert tab.text(".words") == before[1]
    tab.page.click("#clear")
    tab.page.click("#remove")
    tab.page.reload()
    assert tab.text("#document-name") == "No document"
    assert not tab.count("#exchanges li")


def test_a_pdf_is_read_by_the_server_and_what_is_none_is_refused(tab):
    pytest.importorskip("pypdf")
    file = {"name": "tide.pdf", "mimeType": "application/pdf", "buffer": pdf("High tide at six")}
    tab.page.set_input_files("#file", file)
    tab.page.wait_for_selector("#view", state="visible")
    assert tab.text("#text") == "High tide at six"
    assert tab.text("#document-name") == "tide.pdf"
    tab.page.click("#replace")
    tab.page.set_input_files("#file", {**file, "buffer": b"no such thing"})
    tab.page.wait_for_selector("#document-error", state="visible")
    assert "no PDF" in tab.text("#document-error")
    assert tab.complaints.pop().endswith("400 (Bad Request)")  # the browser's own line


def test_a_dropped_file_and_pasted_text_become_the_document(tab):
    tab.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["# Tides\\r\\nHigh at six."], "tides.md"));
            for (const type of ["dragenter", "dragover", "drop"]) {
                dispatchEvent(new DragEvent(type, {dataTransfer: data, cancelable: true}));
            }
        }"""
    )
    tab.page.wait_for_selector("#view", state="visible")
    assert tab.text("#text") == "# Tides\nHigh at six."
    tab.page.evaluate(
        """() => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text", "Low at noon.");
            const event = new ClipboardEvent("paste", {clipboardData, bubbles: true});
            document.body.dispatchEvent(event);
        }"""
    )
    tab.page.wait_for_selector("#text:has-text('Low at noon.')")


def test_a_full_queue_says_when_to_try_again_and_the_button_waits(tab):
    body = {"error": {"message": "the queue is full", "code": "queue_full"}}
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "1"}, json=body),
    )
    tab.ask(QUESTION)
    tab.page.wait_for_selector(".answer .error button:disabled:has-text('Try again in 1 s')")
    assert "The queue is full." in tab.text(".answer .error")
    tab.page.unroute("**/v1/chat/completions")
    tab.page.click(".answer .error button:enabled")
    tab.page.wait_for_selector(".words span")
    tab.until_answered()
    assert not tab.count(".error:visible")
    assert "429" in tab.complaints.pop()


def test_a_stream_that_breaks_off_is_an_error_beside_what_came(tab):
    _, stream = long_answer(10)
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=stream.partition("data: [DONE]")[0]),
    )
    tab.ask(QUESTION)
    tab.page.wait_for_selector(".answer .error:has-text('ended before the answer did')")
    assert "yes" in tab.text(".words")


def test_a_server_that_asks_for_a_key_is_given_one_that_stays_in_this_tab(chromium, server):
    with serving(server.llm, api_keys=(KEY,)) as locked:
        tab = Tab(chromium, locked.url)
        tab.page.fill("#key-value", "another")
        tab.page.press("#key-value", "Enter")
        tab.page.wait_for_selector("#key-why:has-text('does not take')")
        tab.page.fill("#key-value", KEY)
        tab.page.press("#key-value", "Enter")
        tab.page.wait_for_selector("#model:has-text('reads up to')")
        tab.ask(QUESTION)
        tab.until_answered()
        assert tab.count(".words span")
        assert KEY not in tab.page.evaluate("JSON.stringify(localStorage)")
        assert all("401" in complaint for complaint in tab.complaints)
        tab.context.close()


def test_of_thirty_thousand_tokens_only_what_is_in_sight_is_coloured(tab):
    text, stream = long_answer(30_000)
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))
    tab.page.route("**/tokenize", lambda route: route.fulfill(json={"count": 30_000}))
    tab.open(text)
    tab.ask(QUESTION)
    tab.until_answered()
    tab.page.wait_for_selector("#text .mark")
    assert tab.text("#text") == text.strip()
    assert "2 tokens came back" in tab.text("#returned")
    assert 0 < tab.count("#text span") < 1500
    tab.page.click("#previous")
    tab.page.wait_for_selector("#text > div:last-child .mark.here")
    tab.page.reload()
    tab.page.wait_for_selector("#text .mark")
    assert "2 tokens came back" in tab.text("#returned")


def test_the_page_fits_a_phone_and_can_be_used_by_keyboard(chromium, server):
    size = {"width": 375, "height": 740}
    tab = Tab(chromium, server.url, viewport=size, is_mobile=True, color_scheme="dark")
    tab.open(DOCUMENT)
    tab.ask(QUESTION)
    tab.until_answered()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 375
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.page.click("#theme")
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "light"
    tab.page.reload()
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "light"
    tab.page.keyboard.press("Tab")
    assert tab.text(":focus") == "Skip to the question"
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "question"
    unnamed = "button:not([aria-label]):empty, input:not([type=file]):not([id]), img:not([alt])"
    assert not tab.count(unnamed)
    assert not tab.complaints
    tab.context.close()
