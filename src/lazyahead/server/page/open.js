// Opening a document: a file, pasted text, or the server's example.

const MAX_FILE = 16 << 20; // bytes, as the server's own limit

/** The text of a file, line ends as \n. Throws an Error that says what is wrong. */
async function readFile(file) {
  if (file.size > MAX_FILE) throw new Error(`${file.name} has ${number(file.size / 1e6, 1)} MB; the server takes up to 16 MB.`);
  const isPdf = file.type === "application/pdf" || /\.pdf$/i.test(file.name);
  if (isPdf) return (await extractPdf(file)).text;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is no text in UTF-8. Text, Markdown and PDF files can be read; save others as one of them.`);
  }
}

const tidy = (text) => text.replace(/\r\n?/g, "\n").replaceAll("\0", "").trim();

/** Connects the ways to open a document. `opened` gets {name, text, questions}. */
function connectOpening(opened, askKey) {
  const fail = (message) => { $("document-error").textContent = message; $("document-error").hidden = !message; };

  async function open(name, get) {
    fail("");
    $("document-size").textContent = `Opening ${name} …`;
    try {
      const { text, ...rest } = await get();
      if (!tidy(text)) throw new Error(`${name} has no text in it.`);
      $("document-size").textContent = "";
      opened({ name, ...rest, text: tidy(text) });
    } catch (error) {
      $("document-size").textContent = "";
      if (error.status === 401) askKey(() => open(name, get));
      else fail(sentence(error.message));
    }
  }

  const openFile = (file) => file && open(file.name, async () => ({ text: await readFile(file) }));
  const use = (text) => open("Pasted text", async () => ({ text }));

  $("choose").onclick = () => $("file").click();
  $("file").onchange = () => { openFile($("file").files[0]); $("file").value = ""; };
  $("example").onclick = () => open("the example", example);
  $("use").onclick = () => { use($("paste").value); };
  $("paste").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) use($("paste").value);
  };
  document.addEventListener("paste", (event) => {
    if (event.target.closest("textarea, input")) return;
    const [file] = event.clipboardData.files;
    if (file) openFile(file);
    else if (event.clipboardData.getData("text")) use(event.clipboardData.getData("text"));
  });
  connectDrop(openFile);
}

function connectDrop(openFile) {
  let depth = 0; // enter and leave come for each element on the way
  const hasFile = (event) => [...event.dataTransfer.types].includes("Files");
  const show = (by) => { depth = by ? depth + by : 0; $("drop").hidden = depth <= 0; };
  addEventListener("dragenter", (event) => { if (hasFile(event)) show(1); });
  addEventListener("dragleave", (event) => { if (hasFile(event)) show(-1); });
  addEventListener("dragover", (event) => { if (hasFile(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(0);
    openFile(event.dataTransfer.files[0]);
  });
}
