"""Prompts and conversations to tokens, the question in them marked. Knows tokenizers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from lazyahead.errors import ContextLengthError, RequestError
from lazyahead.text.detokenizer import Detokenizer, Tokenizer, decode
from lazyahead.text.messages import Message, check_text

LONGEST_QUESTION = 1000  # characters; a longer last paragraph is text to read
QUESTION_MARK = "\ue000question\ue000"  # private use: in nobody's text, and no template trims it
ANSWER_MARK = "\ue000answer {}\ue000"
NEXT_QUESTION = ("\n\nQuestion:", "\nQuestion:")
"""Where the answer ends of a model that goes on with questions of its own."""
SLICE = 1 << 18  # characters that are counted at a time


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    token_ids: list[int]
    question: tuple[int, int] | None = None
    """Half-open span of the question's tokens, where the caller said what the question is."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer because of the form that the prompt has."""


def encode_prompt(tokenizer: Tokenizer, document: str, question: str | None = None) -> Prompt:
    """Document and question to tokens, through the chat template where the tokenizer has one.

    Raises RequestError when there is no text at all.
    """
    document = check_text(document or "", "the prompt")
    question = check_text(question or "", "the question").strip()
    if not (document.strip() or question):
        raise RequestError("the prompt is empty; give some text, or a file")
    if tokenizer.chat_template:
        content = "\n\n".join(part for part in (document, question) if part)
        message = {"role": "user", "content": content}
        return _encode(tokenizer, _render(tokenizer, [message], question), False)
    if not question:
        return _encode(tokenizer, document, True)
    head = f"{document}\n\n" if document else ""
    text = f"{head}Question: {QUESTION_MARK}{question}{QUESTION_MARK}\nAnswer:"
    return replace(_encode(tokenizer, text, True), stop=NEXT_QUESTION)


def encode_turn(
    tokenizer: Tokenizer, messages: Sequence[Message], previous: Sequence[int] = ()
) -> Prompt:
    """All messages of a chat to tokens, ready for the answer to the last.

    Where `previous`, prompt and answer tokens of the turns before, says the same, its tokens are
    kept rather than encoded anew, so that a session finds all of them again. The last paragraph of
    the last message counts as the question. Raises RequestError when that message is empty.
    """
    *earlier, last = messages
    question = _question_of(last["content"])
    if tokenizer.chat_template:
        parts = _chat_parts(tokenizer, messages, question)
    else:
        parts = _plain_parts(earlier, last, question)
    if parts is None:
        return _encode(tokenizer, _render(tokenizer, list(messages), question), False)
    is_plain = not tokenizer.chat_template
    stop = NEXT_QUESTION if is_plain and parts.around[-1].endswith("\nAnswer:") else ()
    kept, rest = _continued(tokenizer, parts, list(previous), is_plain)
    turn = _encode(tokenizer, rest, is_plain and not kept)
    span = turn.question and (turn.question[0] + len(kept), turn.question[1] + len(kept))
    return Prompt([*kept, *turn.token_ids], span, stop)


def encode_beginning(tokenizer: Tokenizer, document: str, system: str | None = None) -> list[int]:
    """The tokens that prompts over a document share, whatever is asked: those of two questions
    compared, as templates may treat a text without one differently."""
    before = [] if system is None else [{"role": "system", "content": system}]
    one, other = (
        encode_turn(tokenizer, [*before, {"role": "user", "content": f"{document}\n\n{asked}"}])
        for asked in ("What?", "- 1")
    )
    same = (a == b for a, b in zip(one.token_ids, other.token_ids, strict=False))
    return one.token_ids[: sum(takewhile(bool, same))]


def encode_next(tokenizer: Tokenizer, content: str, previous: Sequence[int]) -> Prompt:
    """The next turn behind `previous`, prompt and answer tokens of whatever turns came before."""
    before = [
        {"role": "user", "content": "..."},
        {"role": "assistant", "content": ANSWER_MARK.format(0)},
    ]
    question = _question_of(content)
    last = {"role": "user", "content": content}
    if tokenizer.chat_template:
        text = _render(tokenizer, [*before, last], question).rpartition(ANSWER_MARK.format(0))[2]
    else:
        text = _plain_parts(before, last, question).around[-1]
    turn = _encode(tokenizer, text, False)
    ended = int([*previous[-1:]] == turn.token_ids[:1])  # the answer brought its own end of turn
    shift = len(previous) - ended
    span = turn.question and (turn.question[0] + shift, turn.question[1] + shift)
    stop = () if tokenizer.chat_template else NEXT_QUESTION
    return Prompt([*previous, *turn.token_ids[ended:]], span, stop)


def _question_of(content: str) -> str:
    """The last paragraph, if it is short enough. Raises RequestError where there is no text."""
    if not content.strip():
        raise RequestError("the message is empty; write something")
    question = content.strip().rpartition("\n\n")[2]
    return question if len(question) <= LONGEST_QUESTION else ""


@dataclass(frozen=True)
class _Parts:
    """A conversation as text: what stands around the answers, and the answers."""

    around: list[str]
    """One more than answers. Only the last may hold the marked question."""
    answers: list[str]

    def text(self, start: int = 0, with_answer: bool = False) -> str:
        """From a part on; `with_answer`: from the answer before it on."""
        pieces = [self.answers[start - 1]] if with_answer else []
        for around, answer in zip(self.around[start:], [*self.answers[start:], ""], strict=True):
            pieces += [around, answer]
        return "".join(pieces)


def _chat_parts(tokenizer: Tokenizer, messages: Sequence[Message], question: str) -> _Parts | None:
    """What the chat template writes; None where it changes answers, or leaves some out."""
    places = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"]
    marks = {place: ANSWER_MARK.format(place) for place in places}
    marked = [
        {**message, "content": marks.get(place, message["content"])}
        for place, message in enumerate(messages)
    ]
    rest = _render(tokenizer, marked, question)
    plain = _render(tokenizer, list(messages), question)
    around = []
    for mark in marks.values():
        head, found, rest = rest.partition(mark)
        if not found:
            return None
        around.append(head)
    said = [str(messages[place]["content"]) for place in places]
    for answers in (said, [answer.strip() for answer in said]):
        parts = _Parts([*around, rest], answers)
        if parts.text() == plain:
            return parts
    return None


def _plain_parts(earlier: Sequence[Message], last: Message, question: str) -> _Parts:
    """The form of a model without a chat template: a text, then questions and answers."""
    around, answers, said = list[str](), list[str](), list[str]()
    for message in earlier:
        if message["role"] == "assistant":
            around.append(_asked(said, is_first=not around))
            answers.append(" " + message["content"].strip())
            said = []
        else:
            said.append(message["content"])
    said.append(_mark(last, question)["content"])
    return _Parts([*around, _asked(said, is_first=not around)], answers)


def _asked(said: Sequence[str], is_first: bool) -> str:
    """What stands before an answer. Of the first text only the last paragraph is a question."""
    text = "\n\n".join(filter(str.strip, said))
    if not is_first:
        return f"\n\nQuestion: {text.strip()}\nAnswer:"
    document, gap, question = text.rstrip().rpartition("\n\n")
    if len(question.replace(QUESTION_MARK, "")) > LONGEST_QUESTION:
        return text
    return f"{document}{gap}Question: {question.strip()}\nAnswer:"


def _continued(
    tokenizer: Tokenizer, parts: _Parts, previous: list[int], is_whole: bool
) -> tuple[list[int], str]:
    """The tokens of `previous` that say the same as the conversation, and the text behind them."""
    place = 0
    for turn, around in enumerate(parts.around):
        tokens = _encode(tokenizer, around, is_whole and not turn).token_ids
        if place and previous[place - 1] == tokens[0]:
            place -= 1  # the answer brought its own end of turn
        if turn == len(parts.answers) or previous[place : place + len(tokens)] != tokens:
            return previous[:place], parts.text(turn)
        place += len(tokens)
        following = _encode(tokenizer, parts.around[turn + 1], False).token_ids
        end = _answer_end(tokenizer, previous[place:], parts.answers[turn], following)
        if end is None:
            return previous[:place], parts.text(turn + 1, with_answer=True)
        place += end
    raise AssertionError("the last part returns")


def _answer_end(
    tokenizer: Tokenizer, tokens: Sequence[int], answer: str, following: Sequence[int]
) -> int | None:
    """How many of the tokens are the answer: as many as say the same, where the `following` ones
    come next if they do. None where they say something else."""
    wanted, tokens, following = answer.strip(), list(tokens), list(following)
    for end in range(len(tokens)):
        start = end - int(end > 0 and tokens[end - 1] == following[0])
        if tokens[start] != following[0] or tokens[start : start + len(following)] != following:
            continue
        if _says(tokenizer, tokens[:end], wanted):
            return end
    if _says(tokenizer, tokens, wanted):
        return len(tokens) or None
    detokenizer, text, found = Detokenizer(tokenizer), "", None
    for end, token in enumerate(tokens, 1):  # a stop text may stand behind the answer
        text += detokenizer.add(token)
        if text.strip() == wanted:
            found = end
        elif len(text.strip()) > len(wanted):
            break
    return found


def _says(tokenizer: Tokenizer, tokens: list[int], wanted: str) -> bool:
    """Whether this is their text, decoded at once or as it was streamed: the two differ where bytes
    are no characters."""
    if decode(tokenizer, tokens).strip() == wanted:
        return True
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(detokenizer.add(token) for token in tokens) + detokenizer.flush()
    return streamed.strip() == wanted


def check_length(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    """Raises ContextLengthError for a text of far more tokens than `max_tokens`, without encoding
    all of it."""
    if len(text) <= 4 * max_tokens:
        return
    count = 0
    for start in range(0, len(text), SLICE):
        piece = text[start : start + SLICE]
        count += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if count > 2 * max_tokens:
            about = count * len(text) // (start + len(piece))
            raise ContextLengthError(
                f"the text of {len(text)} characters has about {about} tokens, more than the "
                f"model's context of {max_tokens}; shorten it"
            )


def _mark(message: Message, question: str) -> Message:
    """The message with marks around the question that it ends with."""
    if not question:
        return message
    head, _, tail = message["content"].rpartition(question)
    return {**message, "content": f"{head}{QUESTION_MARK}{question}{QUESTION_MARK}{tail}"}


def _render(tokenizer: Tokenizer, messages: list[Message], question: str) -> str:
    """The chat template's text, ready for the answer, the question marked unless marks change what
    it writes. Raises RequestError with the template's own words when it refuses the messages."""
    marked = [*messages[:-1], _mark(messages[-1], question)]
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        text, plain = (
            str(tokenizer.apply_chat_template(turns, **options)) for turns in (marked, messages)
        )
    except Exception as error:  # templates are code, and raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the chat template refuses these messages: {reason}") from None
    return text if text.replace(QUESTION_MARK, "") == plain else plain


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Prompt:
    """Text to tokens, and the question in it, where it is marked, to a span of tokens."""
    head, *marked = text.split(QUESTION_MARK)
    text = head + "".join(marked)
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    if len(marked) != 2:
        return Prompt(list(tokenizer(text, **options)["input_ids"]))
    start, end = len(head), len(head) + len(marked[0])
    if tokenizer.is_fast:
        encoding = tokenizer(text, return_offsets_mapping=True, **options)
        inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > start]
        return Prompt(list(encoding["input_ids"]), (inside[0], inside[-1] + 1) if inside else None)
    token_ids = list(tokenizer(text, **options)["input_ids"])
    before = tokenizer(text[:start], **options)["input_ids"]
    same = zip(
        token_ids, before, strict=False
    )  # the question takes all that comes after the document
    first = next(
        (i for i, (a, b) in enumerate(same) if a != b), min(len(before), len(token_ids) - 1)
    )
    return Prompt(token_ids, (first, len(token_ids)))
