// A long text as elements of bounded size, of which only those in sight are coloured.

const CHUNK = 1500; // characters, if lines are no longer
const LONGEST = 6000; // longer lines are broken, so that laying out one chunk never takes long

/** Where to cut: at a line's end, and in very long lines at a sentence's, or behind a space. */
function cut(text, start) {
  if (start + CHUNK >= text.length) return text.length;
  const within = text.lastIndexOf("\n", start + CHUNK);
  if (within >= start) return within + 1;
  const after = text.indexOf("\n", start);
  if (after >= 0 && after < start + LONGEST) return after + 1;
  if (text.length - start < LONGEST) return text.length;
  for (const mark of [". ", " "]) {
    const found = text.lastIndexOf(mark, start + CHUNK);
    if (found > start) return found + mark.length;
  }
  const end = start + CHUNK;
  return /[\udc00-\udfff]/.test(text[end]) ? end + 1 : end; // whole characters
}

class Chunks {
  /** Fills `root`, which scrolls. */
  constructor(root) {
    this.root = root;
    this.all = [];
    this.inSight = new Set();
    this.reading = null;
    this.repaint = eachFrame(() => this.#paintDirty());
    this.observer = new IntersectionObserver((entries) => this.#seen(entries), { root, rootMargin: "500px" });
  }

  show(text) {
    this.observer.disconnect();
    this.inSight.clear();
    this.reading = null;
    this.all = [];
    for (let start = 0, end; start < text.length; start = end) {
      end = cut(text, start);
      const node = el("div", {}, text.slice(start, end));
      node.chunk = { node, start, end, dirty: false };
      this.all.push(node.chunk);
    }
    const fragment = document.createDocumentFragment();
    fragment.append(...this.all.map((chunk) => chunk.node));
    this.root.replaceChildren(fragment);
    this.root.scrollTop = 0;
    this.all.forEach((chunk) => this.observer.observe(chunk.node));
  }

  /** Colours all of it, those parts that are out of sight when they come into it. */
  paint(reading) {
    this.reading = reading;
    this.all.forEach((chunk) => { chunk.dirty = true; });
    this.repaint();
  }

  /** Colours anew the chunks in which these parts are. */
  touch(parts) {
    for (const part of parts) {
      const first = this.at(this.reading.startOf(part));
      const last = this.at(this.reading.ends[part] - 1);
      for (let index = first; index <= last; index++) this.all[index].dirty = true;
    }
    this.repaint();
  }

  /** The index of the chunk with this character. */
  at(place) {
    let low = 0, high = this.all.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.all[middle].end > place) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** Scrolls to a character and returns the element that begins there, if one does. */
  go(place) {
    const chunk = this.all[this.at(place)];
    if (!chunk) return null;
    this.#paint(chunk);
    const node = [...chunk.node.children].find((child) => child.start === place);
    (node ?? chunk.node).scrollIntoView({ block: node ? "center" : "start" });
    return node ?? null;
  }

  #seen(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.inSight.add(target.chunk);
      else this.inSight.delete(target.chunk);
    }
    this.repaint();
  }

  #paintDirty() {
    for (const chunk of this.inSight) if (chunk.dirty) this.#paint(chunk);
  }

  #paint(chunk) {
    if (!this.reading || !chunk.dirty) return;
    chunk.dirty = false;
    const { text } = this.reading;
    const parts = [];
    for (const { start, end, level, back } of this.reading.runs(chunk.start, chunk.end)) {
      const whole = text.slice(start, end);
      const words = whole.trimStart();
      parts.push(level || back ? whole.slice(0, whole.length - words.length) : whole);
      if (!words || !(level || back)) continue;
      const span = el("span", { class: back ? "mark" : `l${level}`, title: back ? "came back while the answer was written" : null }, words);
      span.start = start;
      parts.push(span);
    }
    chunk.node.classList.add("read");
    chunk.node.replaceChildren(...parts);
  }
}
