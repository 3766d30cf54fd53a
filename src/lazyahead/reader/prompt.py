"""The one prompt format of the reader, as a function and as the tokenizer's chat template."""

from collections.abc import Sequence

EOS = "</s>"
READ_FIRST = ("Please read the document first.", "I have read the document.")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] | trim -%}
{%- if message['role'] == 'system' -%}
{{- 'Document: ' + content + '\n\n' -}}
{%- elif message['role'] == 'user' -%}
{%- if content.startswith('Document:') or content.startswith('Question:') -%}
{{- content -}}
{%- elif '\n\n' in content -%}
{{- 'Document: ' + content.rsplit('\n\n', 1)[0] + '\n\nQuestion: ' + content.rsplit('\n\n', 1)[1] -}}
{%- else -%}
{{- 'Question: ' + content -}}
{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}
{{- '\nAnswer:' -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + content + eos_token -}}
{%- if not loop.last -%}
{{- '\n\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""


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
