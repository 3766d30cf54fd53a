"""LongBench's tasks: prompts, lengths, metrics and habits, as its repository has them (MIT).

https://github.com/THUDM/LongBench: config/dataset2prompt.json, config/dataset2maxlen.json, pred.py,
eval.py.
"""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = (
    *("single_doc_qa", "multi_doc_qa", "summarization"),
    *("few_shot", "synthetic", "code"),
)
NEEDS_WORDS = "its score counts Chinese words, which need a word segmenter that is not here"


@dataclass(frozen=True)
class Task:
    """One of LongBench's datasets."""

    category: str
    template: str
    """With `{context}` and mostly `{input}`."""
    max_new_tokens: int
    metric: str | None
    """None: cannot be scored here, see `NEEDS_WORDS`."""
    use_chat_template: bool = True
    first_line_only: bool = False
    marker: str = ""
    """What the last example, the one to be answered, begins with."""

    def prompt(self, context: str, question: str) -> str:
        """The text that a model is given. Braces in either are text."""
        head, _, tail = self.template.partition("{context}")
        return head + context + tail.replace("{input}", question)

    def asked(self, prompt: str) -> str:
        """The end of a prompt that follows the context; empty where it is of another template."""
        tail = self.template.partition("{context}")[2].strip()
        begins = self.marker or tail.partition("{input}")[0]
        start = prompt.rfind(begins) if begins else -1
        return prompt[start:] if start >= 0 else ""


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based "
    "on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_NARRATIVEQA = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer "
    "the question as concisely as you can, using a single phrase if possible. Do not provide any "
    "explanation.\n\nStory: {context}\n\nNow, answer the question based on the story as concisely "
    "as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
    "Question: {input}\n\nAnswer:"
)
_QASPER_RULES = (
    " as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the '
    'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation.\n\n"
)
_QASPER = (
    "You are given a scientific article and a question. Answer the question"
    + _QASPER_RULES
    + "Article: {context}\n\n Answer the question based on the above article"
    + _QASPER_RULES
    + "Question: {input}\n\nAnswer:"
)
_MULTIFIELDQA_EN = (
    "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
    "question based on the above text, only give me the answer and do not output any other "
    "words.\n\nQuestion: {input}\nAnswer:"
)
_MULTIFIELDQA_ZH = (
    "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
    "只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答："
)
_DUREADER = (
    "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
    "问题：{input}\n回答："
)
_GOV_REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
)
_QMSUM = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer "
    "the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based "
    "on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
)
_MULTI_NEWS = (
    "You are given several news passages. Write a one-page summary of all news. \n\n"
    "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
)
_VCSUM = (
    "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n"
    "会议总结："
)
_TREC = (
    "Please determine the type of the question below. Here are some examples of questions.\n\n"
    "{context}\n{input}"
)
_TRIVIAQA = (
    "Answer the question based on the given passage. Only give me the answer and do not output "
    "any other words. The following are some examples.\n\n{context}\n\n{input}"
)
_SAMSUM = (
    "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
    "{context}\n\n{input}"
)
_LSHT = "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}"
_PASSAGE_COUNT = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
    "Please carefully read these paragraphs and determine how many unique paragraphs there are "
    "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
    "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
    "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
    "\n\nThe final answer is: "
)
_PASSAGE_RETRIEVAL_EN = (
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
    "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
    "Please enter the number of the paragraph that the abstract is from. The answer format must "
    'be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)
_PASSAGE_RETRIEVAL_ZH = (
    "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
    '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'
    "答案是："
)
_LCC = "Please complete the code given below. \n{context}Next line of code:\n"
_REPOBENCH = "Please complete the code given below. \n{context}{input}Next line of code:\n"

TASKS = {
    "narrativeqa": Task("single_doc_qa", _NARRATIVEQA, 128, "qa_f1"),
    "qasper": Task("single_doc_qa", _QASPER, 128, "qa_f1"),
    "multifieldqa_en": Task("single_doc_qa", _MULTIFIELDQA_EN, 64, "qa_f1"),
    "multifieldqa_zh": Task("single_doc_qa", _MULTIFIELDQA_ZH, 64, None),
    "hotpotqa": Task("multi_doc_qa", _PASSAGES, 32, "qa_f1"),
    "2wikimqa": Task("multi_doc_qa", _PASSAGES, 32, "qa_f1"),
    "musique": Task("multi_doc_qa", _PASSAGES, 32, "qa_f1"),
    "dureader": Task("multi_doc_qa", _DUREADER, 128, None),
    "gov_report": Task("summarization", _GOV_REPORT, 512, "rouge_l"),
    "qmsum": Task("summarization", _QMSUM, 512, "rouge_l"),
    "multi_news": Task("summarization", _MULTI_NEWS, 512, "rouge_l"),
    "vcsum": Task("summarization", _VCSUM, 512, None),
    "trec": Task("few_shot", _TREC, 64, "classification", False, True, "Question:"),
    "triviaqa": Task("few_shot", _TRIVIAQA, 32, "qa_f1", False, True, "Question:"),
    "samsum": Task("few_shot", _SAMSUM, 128, "rouge_l", False, True, "Dialogue:"),
    "lsht": Task("few_shot", _LSHT, 64, "classification", False, True, "新闻"),
    "passage_count": Task("synthetic", _PASSAGE_COUNT, 32, "count"),
    "passage_retrieval_en": Task("synthetic", _PASSAGE_RETRIEVAL_EN, 32, "retrieval"),
    "passage_retrieval_zh": Task("synthetic", _PASSAGE_RETRIEVAL_ZH, 32, "retrieval"),
    "lcc": Task("code", _LCC, 64, "code_similarity", False),
    "repobench-p": Task("code", _REPOBENCH, 64, "code_similarity", False),
}
"""By dataset; LongBench-E's names end in `_e` and mean the same."""


def find_task(dataset: str) -> Task | None:
    """The task of a dataset's name, LongBench-E's included; None for another benchmark's."""
    return TASKS.get(dataset) or TASKS.get(dataset.removesuffix("_e"))
