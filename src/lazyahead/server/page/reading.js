// How deeply each part of a document was read. A part is a prompt token, or, after a reload, a run of
// tokens of one depth.

class Reading {
  constructor(numLayers, text, { ends, depth, before, counts, offset = 0 }) {
    Object.assign(this, { numLayers, text, ends, depth, before, counts, offset });
    const found = [...new Set(before)].sort((a, b) => a - b);
    if (found.at(-1) !== numLayers) found.push(numLayers);
    this.depths = found; // of the prefill, and all layers
    this.levels = new Map(found.map((value, rank) => [value, this.#level(rank)]));
  }

  /** From the server's `reading`. Where the prompt's tokens do not spell the document, the whole
   * prompt as the model read it takes its place. */
  static ofTokens({ num_layers: numLayers, tokens: texts, depth }, wanted) {
    const whole = texts.join("");
    const found = whole.indexOf(wanted);
    const start = Math.max(found, 0);
    const text = found < 0 ? whole : wanted;
    const ends = [], depths = [];
    let at = -start, offset = 0;
    texts.forEach((part, index) => {
      at += part.length;
      if (at <= 0) offset = index + 1;
      else if (at - part.length < text.length) {
        ends.push(Math.min(at, text.length));
        depths.push(depth[index]);
      }
    });
    const counts = new Uint32Array(ends.length).fill(1);
    return new Reading(numLayers, text, {
      ends: Uint32Array.from(ends), depth: Uint16Array.from(depths), before: Uint16Array.from(depths), counts, offset,
    });
  }

  static fromJSON(kept, text) {
    const column = (at) => kept.runs.map((run) => run[at]);
    let end = 0;
    const ends = Uint32Array.from(column(0), (length) => (end += length));
    return new Reading(kept.numLayers, kept.text ?? text, {
      ends, depth: Uint16Array.from(column(1)), before: Uint16Array.from(column(2)), counts: Uint32Array.from(column(3)),
    });
  }

  /** Runs of parts of one depth; the text only where it is not the document's own. */
  toJSON(documentText) {
    const runs = [];
    let start = 0;
    this.ends.forEach((end, part) => {
      const last = runs.at(-1);
      if (last && last[1] === this.depth[part] && last[2] === this.before[part]) {
        last[0] += end - start;
        last[3] += this.counts[part];
      } else runs.push([end - start, this.depth[part], this.before[part], this.counts[part]]);
      start = end;
    });
    return { numLayers: this.numLayers, text: this.text === documentText ? null : this.text, runs };
  }

  #level(rank) {
    const last = this.depths.length - 1;
    return last ? Math.round((4 * rank) / last) : 4;
  }

  /** 0 for the least deep parts to 4 for all layers. */
  level(part) {
    const depth = this.depth[part];
    return this.levels.get(depth) ?? this.#level(this.depths.findLastIndex((value) => value <= depth));
  }

  isBack = (part) => this.depth[part] > this.before[part];

  /** Takes the server's `revived`; returns the parts of the document among them. */
  revive({ positions, depth }) {
    const parts = [];
    positions.forEach((position, index) => {
      const part = position - this.offset;
      if (part < 0 || part >= this.ends.length) return;
      this.depth[part] = depth[index];
      parts.push(part);
    });
    return parts;
  }

  /** The part that this character belongs to. */
  partAt(place) {
    let low = 0, high = this.ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  startOf = (part) => (part ? this.ends[part - 1] : 0);

  /** Stretches of one look between two characters: {start, end, level, back}. */
  *runs(from, to) {
    let run = null;
    for (let part = this.partAt(from), start = from; start < to; part++) {
      const end = part < this.ends.length ? Math.min(this.ends[part], to) : to;
      const level = part < this.ends.length ? this.level(part) : 0;
      const back = part < this.ends.length && this.isBack(part);
      if (run && run.level === level && run.back === back) run.end = end;
      else {
        if (run) yield run;
        run = { start, end, level, back };
      }
      start = end;
    }
    if (run) yield run;
  }

  /** First characters of the passages that came back. */
  passages() {
    const isShown = ({ start, end, back }) => back && this.text.slice(start, end).trim();
    return [...this.runs(0, this.text.length)].filter(isShown).map((run) => run.start);
  }

  /** Tokens at each depth that the prefill left, deepest first, and those that came back. */
  tally() {
    const byDepth = new Map(this.depths.map((depth) => [depth, 0]));
    let back = 0, all = 0;
    this.before.forEach((depth, part) => {
      byDepth.set(depth, byDepth.get(depth) + this.counts[part]);
      all += this.counts[part];
      if (this.isBack(part)) back += this.counts[part];
    });
    return { all, back, depths: [...byDepth].filter(([, count]) => count).reverse() };
  }
}
