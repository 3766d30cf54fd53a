// The page as a whole: its state, its keys, its colours.

const view = new DocumentView();
const chat = new Chat(view, keep);
const options = { theme: "auto", prefill: "", longest: "512" };
let contextLength = 0;

function state() {
  const exchanges = chat.exchanges.map(({ question, lazy, full, prefill, longest }) => ({ question, lazy, full, prefill, longest }));
  const reading = view.reading && chat.document ? view.reading.toJSON(chat.document.text) : null;
  return { document: chat.document, exchanges, reading, options };
}

function keep() {
  if (!save(state())) notice("The document is too large for this browser to keep; it is gone after a reload.");
}

/** Shows a document, or none, and what was said about it. */
function begin({ document: shown = null, exchanges = [], reading = null }) {
  chat.document = shown;
  $("open").hidden = Boolean(shown);
  $("keep").hidden = true;
  $("replace").hidden = $("remove").hidden = !shown;
  $("document-error").hidden = true;
  view.show(shown?.name ?? "No document", shown?.text ?? "");
  if (shown && reading) view.read(Reading.fromJSON(reading, shown.text));
  chat.restore(exchanges);
  suggest(shown?.questions ?? []);
  measure();
}

/** A new document begins a new conversation; the old ones can be had back. */
function change(shown, said) {
  const before = state();
  begin({ document: shown });
  keep();
  const undo = before.exchanges.length || (before.document && !shown) ? () => { begin(before); keep(); } : null;
  if (undo) notice(said, undo);
  (shown ? $("question") : $("choose")).focus();
}

function suggest(questions) {
  $("suggestions").replaceChildren(...questions.map((question) =>
    el("li", {}, el("button", { type: "button", onclick: () => ask(false, question) }, question))));
}

/** Tells how long the document is for the model. */
async function measure() {
  const { document: shown } = chat;
  if (!shown) {
    $("document-size").textContent = "";
    return;
  }
  $("document-size").textContent = `${number(shown.text.length)} characters`;
  const refuse = (message) => { $("document-error").textContent = message; $("document-error").hidden = false; };
  const count = await countTokens(shown.text).catch((error) => (error.status === 400 ? error.message : 0));
  if (!count || chat.document !== shown) return;
  if (typeof count === "string") {
    refuse(`The model cannot read all of it: ${sentence(count)}`);
    return;
  }
  $("document-size").textContent = tokens(count);
  if (contextLength && count >= contextLength) {
    refuse(`The document has ${tokens(count)}; the model reads at most ${number(contextLength)}. Shorten it before you ask.`);
  }
}

function ask(compare, question = $("question").value.trim()) {
  if (chat.running) return;
  if (!question) {
    $("question").focus();
    notice("Write a question first.");
    return;
  }
  $("question").value = "";
  chat.ask(question, { compare, prefill: options.prefill, longest: Number(options.longest) });
}

/** Lets the reader give an API key, then goes on. */
function askKey(then) {
  const dialog = $("key");
  if (dialog.open) return;
  if (apiKey.get()) $("key-why").textContent = "The server does not take this API key. Give another one; it is kept in this tab only.";
  $("key-value").value = "";
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    apiKey.set($("key-value").value.trim());
    dialog.close();
    then();
  };
  $("key-cancel").onclick = () => dialog.close();
  dialog.showModal();
}

async function greet() {
  try {
    const [model] = await models();
    contextLength = model.max_model_len;
    $("model").textContent = `${model.id} · reads up to ${tokens(contextLength)}`;
    measure();
  } catch (error) {
    $("model").textContent = error.status === 401 ? "This server asks for an API key" : error.message;
    if (error.status === 401) askKey(greet);
  }
}

const THEMES = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" };
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const dark = options.theme === "dark" || (options.theme === "auto" && prefersDark.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = THEMES[options.theme];
  $("theme").setAttribute("aria-label", `Colours: ${options.theme}`);
  view.redraw();
}

function connectOptions() {
  $("theme").onclick = () => {
    const names = Object.keys(THEMES);
    options.theme = names[(names.indexOf(options.theme) + 1) % names.length];
    applyTheme();
    keep();
  };
  prefersDark.addEventListener("change", applyTheme);
  for (const name of ["prefill", "longest"]) {
    $(name).value = options[name];
    $(name).onchange = () => { options[name] = $(name).value; keep(); };
  }
}

function connectButtons() {
  $("ask").onsubmit = (event) => { event.preventDefault(); ask(false); };
  $("compare").onclick = () => ask(true);
  $("cancel").onclick = () => { chat.cancel(); $("question").focus(); };
  $("remove").onclick = () => change(null, "The document and what was said about it are removed.");
  $("replace").onclick = () => { $("open").hidden = false; $("view").hidden = $("legend").hidden = true; $("keep").hidden = false; $("choose").focus(); };
  $("keep").onclick = () => { $("open").hidden = $("keep").hidden = true; $("view").hidden = false; view.redraw(); };
  $("clear").onclick = () => {
    const before = state();
    begin({ document: chat.document });
    keep();
    notice("The conversation is cleared.", () => { begin(before); keep(); });
  };
  $("fold").onclick = () => {
    const folded = $("document").classList.toggle("folded");
    $("fold").textContent = folded ? "Document ▸" : "Document ▾";
    $("fold").setAttribute("aria-expanded", !folded);
  };
}

function connectKeys() {
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("key").open) {
      if (chat.running) { chat.cancel(); $("question").focus(); }
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === $("question")) {
      event.preventDefault();
      ask(false);
    }
  });
  addEventListener("pagehide", () => { if (chat.running) save(state()); });
}

function start() {
  const kept = load();
  Object.assign(options, kept.options);
  chat.askKey = askKey;
  connectOptions();
  connectButtons();
  connectKeys();
  connectOpening((opened) => change(opened, "A new document begins a new conversation."), askKey);
  applyTheme();
  begin(kept);
  greet();
}

start();
