"""The prompt format of the reader. The chat template of its tokenizer renders the same text."""

from collections.abc import Sequence

EOS = "</s>"
READ_FIRST = ("Please read the document first.", "I have read the document.")


def user_message(document: str, question: str) -> str:
    """The first user message of a conversation about `document`."""
    return f"Document: {document}\n\nQuestion: {question}"


def format_prompt(document: str, question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """The text the reader continues with an answer and the end-of-text token.

    `history` holds earlier (question, answer) pairs about the same document, oldest first.
    """
    turns = "".join(
        f"Question: {asked}\nAnswer: {answered}{EOS}\n\n" for asked, answered in history
    )
    return f"Document: {document}\n\n{turns}Question: {question}\nAnswer:"
