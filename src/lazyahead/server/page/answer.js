// One answer: its words and where they come from, its figures, what went wrong.

const SOURCES = {
  prompt: "drafted from the document or the conversation",
  answer: "drafted from this answer's own words",
  memory: "drafted from earlier answers",
};

/** What is kept of an answer. `state`: writing, done, cancelled, failed. */
const newAnswer = () => ({ spans: [], stats: null, state: "writing", finish: null, ms: 0, error: null });

const textOf = (answer) => answer.spans.map((span) => span.text).join("");

/** Puts a span's text into its element; what was drafted is underlined from its first letter on. */
function fillSpan(node, { text, source }) {
  if (node.textContent.length === text.length) return node;
  const title = SOURCES[source];
  const words = title ? text.trimStart() : "";
  const drafted = words && el("span", { class: `from from-${source}`, title }, words);
  node.replaceChildren(text.slice(0, text.length - words.length), drafted);
  return node;
}

class AnswerView {
  /** `heading` where there are two; `retry` asks again; `foot` stands below the words. */
  constructor(answer, { heading = null, retry = null, foot = null } = {}) {
    Object.assign(this, { answer, retry });
    this.words = el("div", { class: "words" });
    this.state = el("div", {});
    this.figures = el("dl", { class: "figures" });
    this.node = el("article", { class: "answer" }, heading && el("h3", {}, heading),
      el("div", {}, this.words, this.state, foot), this.figures);
    this.shown = 0; // spans
    this.bar = null;
    this.draw = eachFrame(() => this.#draw());
    this.#draw();
  }

  /** Before the first token. */
  progress(text, ms) {
    if (this.answer.spans.length || this.answer.state !== "writing") return;
    const share = Number(/(\d+) %/.exec(text)?.[1] ?? NaN);
    const waits = text === "waiting";
    const said = waits ? "Waiting for a place" : Number.isNaN(share) ? "Reading" : `Reading ${share} %`;
    if (!this.bar) {
      this.bar = el("progress", { max: 100, "aria-label": "How much of the prompt was read" });
      this.state.replaceChildren(el("p", { class: "progress" }), this.bar);
    }
    if (!Number.isNaN(share)) this.bar.value = share;
    this.state.firstChild.textContent = `${said} · ${duration(ms)}`;
  }

  /** Adds a chunk's spans; neighbours of one source are one. */
  add(spans) {
    for (let { text, source } of spans) {
      const last = this.answer.spans.at(-1);
      if (!last) text = text.trimStart();
      if (!text) continue;
      if (last?.source === source) last.text += text;
      else this.answer.spans.push({ text, source });
    }
    this.draw();
  }

  #draw() {
    this.#drawWords();
    this.#drawFigures();
    this.#drawState();
  }

  #drawWords() {
    const { spans } = this.answer;
    if (this.shown) fillSpan(this.words.lastChild, spans[this.shown - 1]);
    for (; this.shown < spans.length; this.shown++) {
      this.words.append(fillSpan(el("span"), spans[this.shown]));
    }
    this.words.classList.toggle("writing", this.answer.state === "writing" && spans.length > 0);
    if (spans.length && this.answer.state === "writing") this.state.replaceChildren();
  }

  #drawFigures() {
    const { stats, ms, state } = this.answer;
    this.node.classList.toggle("told", Boolean(stats));
    if (!stats) return;
    const { tokens_per_s: speed } = stats;
    const rows = [
      ["First token", duration(stats.ttft_ms)],
      ["Whole answer", state === "writing" ? "…" : duration(ms)],
      ["Tokens a second", speed ? number(speed, speed < 10 ? 1 : 0) : "–"],
      ["Tokens a step", number(stats.tokens_per_step, 2)],
      ["Answer", tokens(stats.answer_tokens)],
      ["Prompt", tokens(stats.prompt_tokens)],
      ["Share read", percent(stats.prompt_tokens_computed)],
      ["From cache", number(stats.cached_tokens)],
      ["Came back", number(stats.revived)],
    ];
    this.figures.replaceChildren(...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  #drawState() {
    const { state, finish, error } = this.answer;
    if (state === "writing") return;
    const notes = [];
    if (state === "cancelled") notes.push(el("p", { class: "after" }, "Cancelled."));
    if (finish === "length") notes.push(el("p", { class: "after" }, "Stopped at the longest answer that was asked for."));
    if (state === "done" && !textOf(this.answer)) notes.push(el("p", { class: "after" }, "The model answered with no text."));
    if (error) notes.push(this.#error(error));
    const drafted = this.#drafted();
    if (drafted) notes.push(drafted);
    this.state.replaceChildren(...notes);
  }

  /** A legend of the underlines in this answer. */
  #drafted() {
    const found = Object.keys(SOURCES).filter((source) => this.answer.spans.some((span) => span.source === source));
    if (!found.length) return null;
    return el("p", { class: "drafted" }, ...found.map((source) => el("span", { class: `from from-${source}` }, SOURCES[source])));
  }

  #error({ message, status, until }) {
    const box = el("div", { class: "error", role: "alert" }, el("p", {}, sentence(message)));
    if (!this.retry) return box;
    const button = el("button", { type: "button", onclick: () => this.retry() }, "Try again");
    box.append(button);
    if (status === 429 || status === 503) this.#wait(button, until);
    return box;
  }

  /** Counts down to when the server said it may be asked again. */
  #wait(button, until) {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) setTimeout(() => this.#wait(button, until), 250);
  }
}
