// What outlives a reload: the conversation in localStorage, the API key in this tab only.

const STORE = "lazyahead.page.1";
const STORE_LIMIT = 4_000_000; // characters; browsers take about five million
const MAX_EXCHANGES = 50;

const apiKey = {
  get: () => sessionStorage.getItem("lazyahead.key") ?? "",
  set: (key) => sessionStorage.setItem("lazyahead.key", key),
};

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

/** Keeps the state: {document, exchanges, reading, options}. What is too large goes, first how deep
 * the document was read, then old exchanges, then the document. Returns whether all was kept. */
function save(state) {
  const kept = { ...state, exchanges: state.exchanges.slice(-MAX_EXCHANGES) };
  const drops = [() => { kept.reading = null; }];
  for (let half = kept.exchanges.length; half > 1; half >>= 1) {
    drops.push(() => { kept.exchanges = kept.exchanges.slice(-(half >> 1)); });
  }
  drops.push(() => { kept.document = null; kept.exchanges = []; });
  for (const drop of [() => {}, ...drops]) {
    drop();
    const text = JSON.stringify(kept);
    if (text.length > STORE_LIMIT) continue;
    try {
      localStorage.setItem(STORE, text);
      return kept.document === state.document;
    } catch { /* full: less may fit */ }
  }
  return false;
}
