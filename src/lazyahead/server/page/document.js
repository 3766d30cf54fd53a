// The document: its text, how deeply it was read, and a map of all of it.

class DocumentView {
  constructor() {
    this.chunks = new Chunks($("text"));
    this.reading = null;
    this.here = -1;
    this.redraw = eachFrame(() => { this.#legend(); this.#map(); });
    new ResizeObserver(() => this.redraw()).observe($("map"));
    $("map").onclick = (event) => this.chunks.go(Math.floor((event.offsetY / $("map").clientHeight) * this.text.length));
    $("next").onclick = () => this.#step(1);
    $("previous").onclick = () => this.#step(-1);
    this.text = "";
  }

  show(name, text) {
    this.text = text;
    this.reading = null;
    $("document-name").textContent = name;
    $("view").hidden = !text;
    $("legend").hidden = true;
    this.chunks.show(text);
    this.redraw();
  }

  /** Colours the document as an answer's prefill left it. */
  read(reading) {
    if (reading.text !== this.text) {
      this.text = reading.text;
      this.chunks.show(reading.text);
    }
    this.reading = reading;
    this.here = -1;
    this.chunks.paint(reading);
    this.redraw();
  }

  forget() {
    if (this.reading) this.show($("document-name").textContent, this.text);
  }

  revive(revived) {
    if (!this.reading) return;
    this.chunks.touch(this.reading.revive(revived));
    this.redraw();
  }

  #step(by) {
    const places = this.reading.passages();
    if (!places.length) return;
    this.here = (this.here + by + places.length + (this.here < 0 && by < 0 ? 1 : 0)) % places.length;
    const node = this.chunks.go(places[this.here]);
    $("text").querySelectorAll(".here").forEach((old) => old.classList.remove("here"));
    node?.classList.add("here");
    live.say(`${this.here + 1} of ${places.length}: ${node?.textContent ?? ""}.`);
  }

  #legend() {
    $("legend").hidden = !this.reading;
    if (!this.reading) return;
    const { all, back, depths } = this.reading.tally();
    $("depths").replaceChildren(...depths.map(([depth, count]) => el("li", {},
      el("span", { class: `swatch l${this.reading.levels.get(depth)}` }, percent(count / all)),
      depth === this.reading.numLayers ? `read through all ${depth} layers` : `to layer ${depth}`)));
    $("returned").hidden = !back;
    $("returned-count").textContent = `${tokens(back)} came back`;
  }

  /** A line for each row of pixels: the mean depth of its characters; on the right, marks of what came back. */
  #map() {
    const canvas = $("map");
    const scale = devicePixelRatio;
    const width = (canvas.width = Math.round(canvas.clientWidth * scale));
    const height = (canvas.height = Math.round(canvas.clientHeight * scale));
    const { reading } = this;
    if (!reading || !height) return;
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const depth = colour("--depth"), mark = colour("--back");
    const pen = canvas.getContext("2d");
    const sums = new Float32Array(height), sizes = new Float32Array(height), backs = new Set();
    const row = (place) => Math.min(height - 1, Math.floor((place / reading.text.length) * height));
    reading.ends.forEach((end, part) => {
      const start = reading.startOf(part);
      for (let y = row(start); y <= row(end - 1); y++) {
        sums[y] += reading.level(part) / 4;
        sizes[y] += 1;
        if (reading.isBack(part)) backs.add(y);
      }
    });
    for (let y = 0; y < height; y++) {
      if (!sizes[y]) sums[y] = sums[y - 1] ?? 0, sizes[y] = sizes[y - 1] ?? 1;
      pen.fillStyle = `rgb(${depth} / ${0.75 * (sums[y] / sizes[y])})`;
      pen.fillRect(0, y, width, 1);
    }
    pen.fillStyle = mark;
    for (const y of backs) pen.fillRect(0.6 * width, y, width, scale);
  }
}
