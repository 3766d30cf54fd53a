// The server's endpoints.

class ApiError extends Error {
  constructor(status, message, { code = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** The response, if it is a good one. Throws ApiError, or AbortError when cancelled. */
async function call(path, { body, type = "application/json", signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) headers["Content-Type"] = type;
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const told = (await response.json().catch(() => ({}))).error ?? {};
  throw new ApiError(response.status, told.message ?? `The server answered ${response.status}.`, {
    code: told.code,
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
  });
}

const getJson = async (path) => (await call(path)).json();
const postJson = async (path, value, signal) =>
  (await call(path, { body: JSON.stringify(value), signal })).json();

const models = async () => (await getJson("/v1/models")).data;
const example = () => getJson("/v1/example");
const countTokens = async (prompt) => (await postJson("/tokenize", { prompt })).count;
const extractPdf = async (file) =>
  (await call("/v1/extract", { body: file, type: "application/octet-stream" })).json();

/** Asks, and calls `onProgress` with what the server says before the first token, then `onChunk` with
 * each choice. Throws ApiError where the answer breaks off. */
async function streamChat(request, { onProgress, onChunk, signal }) {
  const body = JSON.stringify({ ...request, stream: true });
  const response = await call("/v1/chat/completions", { body, signal });
  for await (const event of serverEvents(response)) {
    if (event.startsWith(":")) {
      onProgress(event.slice(1).trim());
      continue;
    }
    const data = event.replace(/^data: ?/, "");
    if (data === "[DONE]") return;
    const { error, choices } = JSON.parse(data);
    if (error) throw new ApiError(0, error.message, { code: error.code });
    choices.forEach(onChunk);
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      yield* events;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
