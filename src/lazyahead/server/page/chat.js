// The conversation: what was asked, what is being answered, and the comparison with everything read.

const EVERYTHING = { prefill: "off", decode: "off" };

class Chat {
  /** `view` is the document's; `changed` is called when something is worth keeping. */
  constructor(view, changed) {
    Object.assign(this, { view, changed, exchanges: [], document: null, running: null, askKey: null });
  }

  /** Shows exchanges that were kept. */
  restore(exchanges) {
    this.cancel();
    this.exchanges = exchanges;
    for (const { lazy, full } of exchanges) {
      for (const answer of [lazy, full]) if (answer?.state === "writing") answer.state = "cancelled";
    }
    $("exchanges").replaceChildren();
    exchanges.forEach((exchange) => this.#place(exchange));
    if (exchanges.length) this.#follow(true);
    this.update();
  }

  async ask(question, { compare = false, prefill = "", longest = 0 }) {
    const exchange = { question, lazy: newAnswer(), full: null, prefill, longest };
    this.exchanges.push(exchange);
    this.#place(exchange);
    this.#follow(true);
    await this.#answer(exchange, "lazy");
    if (compare && exchange.lazy.state === "done") await this.compare(exchange);
  }

  /** Answers once more with everything read and nothing drafted, beside the first answer. */
  async compare(exchange) {
    exchange.full = newAnswer();
    this.#place(exchange);
    await this.#answer(exchange, "full");
  }

  cancel() {
    this.running?.abort();
  }

  update() {
    const busy = Boolean(this.running);
    for (const id of ["submit", "compare"]) $(id).hidden = busy;
    $("cancel").hidden = !busy;
    $("clear").hidden = busy || !this.exchanges.length;
    $("start").hidden = this.exchanges.length > 0;
    $("exchanges").setAttribute("aria-busy", busy);
    document.querySelectorAll(".foot button").forEach((button) => { button.disabled = busy; });
  }

  /** The messages up to this question. The document opens the first one, so that all questions about
   * it share their beginning. */
  messagesFor(exchange) {
    const messages = [];
    for (const { question, lazy } of this.exchanges.slice(0, this.exchanges.indexOf(exchange))) {
      const said = textOf(lazy);
      if (said.trim()) messages.push({ role: "user", content: question }, { role: "assistant", content: said });
    }
    messages.push({ role: "user", content: exchange.question });
    if (this.document) messages[0].content = `${this.document.text}\n\n${messages[0].content}`;
    return messages;
  }

  #request(exchange, which) {
    const lazyahead = which === "full" ? { ...EVERYTHING } : {};
    if (which === "lazy" && exchange.prefill) lazyahead.prefill = exchange.prefill;
    const request = { messages: this.messagesFor(exchange), lazyahead: { ...lazyahead, detail: true } };
    if (exchange.longest) request.max_tokens = exchange.longest;
    return request;
  }

  async #answer(exchange, which) {
    const answer = exchange[which];
    const view = exchange.views[which];
    const began = performance.now();
    const elapsed = () => performance.now() - began;
    let reading = "";
    const ticking = setInterval(() => view.progress(reading, elapsed()), 100);
    const controller = (this.running = new AbortController());
    this.update();
    live.say(which === "full" ? "Reading everything. " : "Reading. ");
    try {
      await streamChat(this.#request(exchange, which), {
        signal: controller.signal,
        onProgress: (text) => { reading = text; },
        onChunk: (choice) => this.#chunk(exchange, which, choice),
      });
      answer.state = "done";
      live.say(` End of the answer, after ${duration(elapsed())}.`);
    } catch (error) {
      this.#failed(answer, error);
    } finally {
      clearInterval(ticking);
      answer.ms = elapsed();
      if (this.running === controller) this.running = null;
    }
    this.#place(exchange);
    this.#follow();
    this.update();
    this.changed();
    if (answer.error?.status === 401) this.askKey(() => this.#again(exchange, which));
  }

  #chunk(exchange, which, { lazyahead, finish_reason: finish }) {
    const answer = exchange[which];
    if (finish) answer.finish = finish;
    if (!lazyahead) return;
    answer.stats = lazyahead.stats;
    if (which === "lazy" && this.document) {
      if (lazyahead.reading) this.view.read(Reading.ofTokens(lazyahead.reading, this.document.text));
      if (lazyahead.revived) this.view.revive(lazyahead.revived);
    }
    exchange.views[which].add(lazyahead.spans);
    live.say(lazyahead.spans.map((span) => span.text).join(""));
    this.#follow();
  }

  #failed(answer, error) {
    if (error.name === "AbortError") {
      answer.state = "cancelled";
      live.say(" Cancelled.");
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    answer.state = "failed";
    const wait = error.retryAfter ?? 0;
    answer.error = { status: error.status ?? 0, message: error.message, until: Date.now() + 1000 * wait };
  }

  async #again(exchange, which) {
    if (this.running) return;
    exchange[which] = newAnswer();
    this.#place(exchange);
    await this.#answer(exchange, which);
  }

  /** Draws an exchange, in place of what was drawn of it before. */
  #place(exchange) {
    const heading = exchange.full ? { lazy: "Read lazily, drafted ahead", full: "Everything read, nothing drafted" } : {};
    exchange.views = {};
    for (const which of ["lazy", "full"]) {
      if (!exchange[which]) continue;
      const retry = () => this.#again(exchange, which);
      const foot = exchange.full ? null : this.#foot(exchange);
      exchange.views[which] = new AnswerView(exchange[which], { heading: heading[which], retry, foot });
    }
    const nodes = Object.values(exchange.views).map((view) => view.node);
    const item = el("li", {}, el("h2", { class: "question" }, exchange.question),
      el("div", { class: exchange.full ? "answers two" : "answers" }, ...nodes),
      exchange.full?.state === "done" && exchange.lazy.state === "done" ? el("p", { class: "verdict" }, ...verdict(exchange)) : null);
    if (exchange.item) exchange.item.replaceWith(item);
    else $("exchanges").append(item);
    exchange.item = item;
  }

  #foot(exchange) {
    if (exchange.lazy.state !== "done") return null;
    const button = el("button", { class: "quiet", type: "button", onclick: () => this.compare(exchange) }, "Compare with everything read");
    return el("div", { class: "foot" }, button);
  }

  /** Keeps the end in sight, unless the reader has scrolled away from it. */
  #follow(always = false) {
    const box = $("scroll");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 120;
    if (always || atEnd) requestAnimationFrame(() => { box.scrollTop = box.scrollHeight; });
  }
}

/** How the two answers of an exchange differ, in words. */
function verdict({ lazy, full }) {
  const ratio = (a, b) => (b >= a ? `${number(b / a, 1)} times sooner` : `${number(a / b, 1)} times later`);
  const words = (answer) => textOf(answer).trim().split(/\s+/);
  const [ours, theirs] = [words(lazy), words(full)];
  const differs = ours.findIndex((word, at) => word !== theirs[at]);
  const first = differs < 0 && theirs.length > ours.length ? ours.length : differs;
  return [
    el("b", {}, `First token ${ratio(lazy.stats.ttft_ms, full.stats.ttft_ms)}`), ", ",
    el("b", {}, `whole answer ${ratio(lazy.ms, full.ms)}`), ". ",
    first < 0 ? "The two texts are the same." : `The texts differ from word ${first + 1} on.`,
  ];
}
