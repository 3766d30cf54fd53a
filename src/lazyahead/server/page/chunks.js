// A long text as elements of bounded size, of which only those in sight are coloured.

const CHUNK = 1500; // characters

/** Where to cut: at line ends where lines allow it, else behind a space. Returns the ends. */
function cuts(text) {
  const ends = [];
  for (let start = 0; start < text.length;) {
    const limit = start + CHUNK;
    let end = text.length;
    if (limit < end) {
      const line = text.lastIndexOf("\n", limit);
      const space = text.lastIndexOf(" ", limit);
      end = 1 + (line > start ? line : space > start ? space : limit - 1);
      if (/[\udc00-\udfff]/.test(text[end])) end++; // whole characters
    }
    ends.push(end);
    start = end;
  }
  return ends;
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
    let start = 0;
    this.all = cuts(text).map((end) => {
      const startsLine = !start || text[start - 1] === "\n";
      const lines = startsLine && (text[end - 1] === "\n" || end === text.length);
      const node = el(lines ? "div" : "span", { class: lines ? "lines" : null }, text.slice(start, end));
      const chunk = { node, start, end, dirty: false };
      node.chunk = chunk;
      start = end;
      return chunk;
    });
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
      const words = text.slice(start, end);
      if (!level && !back) {
        parts.push(words);
        continue;
      }
      const span = el("span", { class: back ? "mark" : `l${level}`, title: back ? "came back while the answer was written" : null }, words);
      span.start = start;
      parts.push(span);
    }
    chunk.node.classList.add("read");
    chunk.node.replaceChildren(...parts);
  }
}
