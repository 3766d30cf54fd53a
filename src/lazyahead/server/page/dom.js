// Elements, and numbers as people read them.

const $ = (id) => document.getElementById(id);

/** An element; attributes that begin with "on" are listeners, false and null are left out. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

const percent = (share) => `${number(100 * share, share > 0 && share < 0.01 ? 1 : 0)} %`;

const tokens = (count) => `${number(count)} token${count === 1 ? "" : "s"}`;

/** With a capital letter and a full stop. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function duration(ms) {
  if (ms < 1000) return `${number(ms)} ms`;
  if (ms < 100_000) return `${number(ms / 1000, ms < 10_000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

/** Calls at most once a frame, with the latest arguments. */
function eachFrame(call) {
  let latest = null;
  return (...args) => {
    if (latest === null) requestAnimationFrame(() => { const given = latest; latest = null; call(...given); });
    latest = args;
  };
}

/** What a screen reader hears: whole sentences, or what has gathered for a while. */
const live = {
  text: "",
  timer: 0,

  say(text) {
    this.text += text;
    const ends = /[.!?:\n]\s*$/.test(this.text);
    if (!this.timer) this.timer = setTimeout(() => this.flush(), ends ? 400 : 2500);
  },

  flush() {
    clearTimeout(this.timer);
    this.timer = 0;
    const text = this.text.trim();
    this.text = "";
    if (!text) return;
    const region = $("live");
    region.append(el("p", {}, text));
    while (region.childElementCount > 20) region.firstChild.remove();
  },
};

let noticeTimer = 0;

/** A line at the bottom of the page for some seconds, with a way back where there is one. */
function notice(text, undo = null) {
  const box = $("notice");
  const button = box.querySelector("button");
  box.querySelector("span").textContent = text;
  box.hidden = false;
  button.hidden = !undo;
  button.onclick = () => { box.hidden = true; undo(); };
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { box.hidden = true; }, undo ? 12_000 : 6_000);
}
