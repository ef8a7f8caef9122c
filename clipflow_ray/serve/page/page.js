// The page at `/`. Images go to POST /v1/detect a few at a time, so that the first verdicts show while others wait.
// Text from a file or from the server is always set as text, never as markup.

const GROUP = 4; // images per request
const RETRIES = 5; // how often a busy server is asked again before the page offers a button
const THUMB = 208; // pixels of a preview's longer side
const PREVIEW_PIXELS = 50e6; // above this a preview would need too much of the browser's memory

const VERDICTS = { likely_ai: "likely AI", inconclusive: "inconclusive", no_ai_signal: "no AI signal" };
const WORDS = {
  below_alpha: (limit) => `At or below the threshold of ${limit}: photographs rarely score this high, but some do.`,
  near_alpha: (limit) => `Above the threshold of ${limit}, but near it: unusual, but not unusual enough to flag.`,
  above_alpha: (limit) => `Well above the threshold of ${limit}: nothing unusual was found. AI-generated images can look like this too.`,
  stratum_prone: () => "Photographs of this format and size are flagged too often, so this result says less than others.",
  no_exif: () => "No camera data (EXIF) in the file. Editing, sharing and screenshots remove it too.",
  enlarged_to_view: () => "Smaller than the model's input, so it was enlarged.",
};

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 2 });
const percent = (share) => `${number(100 * share)} %`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const say = (text) => ($("status").textContent = text);
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

let model = null; // the answer of /v1/model
let token = "";
let items = []; // {file, node, outcome: null | verdict | "error"}, in the order in which they were given
let busy = false;
let previews = Promise.resolve(); // one preview is decoded at a time

// --- asking the server ----------------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(code, message, { status = 0, requestId = "", wait = null } = {}) {
    super(message);
    Object.assign(this, { code, status, requestId, wait });
  }
  // Nothing is wrong with the images, and the same request may succeed later.
  get temporary() {
    return this.code === "network" || this.wait !== null;
  }
}

async function ask(path, options = {}) {
  let response, body;
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    response = await fetch(path, { ...options, headers, cache: "no-store" });
    body = await response.text();
  } catch {
    throw new Problem("network", "The server cannot be reached. Check the connection, then try again.");
  }
  try {
    body = JSON.parse(body);
  } catch {
    body = {};
  }
  if (response.ok) return body;
  const { code = `http_${response.status}`, message = "The server refused the request.", request_id } = body.error ?? {};
  const seconds = Number(response.headers.get("Retry-After")) || 2;
  const wait = [429, 503].includes(response.status) ? Math.min(Math.max(seconds, 1), 60) : null;
  throw new Problem(code, message, { status: response.status, requestId: request_id, wait });
}

// Waits as long as a busy server asks for. If the server wants a token, asks the user for it.
async function insist(path, options) {
  for (let tries = 0; ; ) {
    try {
      return await ask(path, options);
    } catch (problem) {
      if (problem.status === 401) {
        await tokenGiven(token ? "That token was not accepted." : "");
        continue;
      }
      if (problem.wait === null || ++tries > RETRIES) throw problem;
      say(`The server is busy. Trying again in ${plural(problem.wait, "second")}.`);
      await pause(problem.wait);
    }
  }
}

function tokenGiven(complaint) {
  const form = $("token-form");
  form.hidden = false;
  $("token-complaint").textContent = complaint;
  $("token").setAttribute("aria-invalid", Boolean(complaint));
  $("token").focus(); // a screen reader then reads the complaint, which is part of the field's description
  say("Waiting for the access token.");
  return new Promise((done) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      token = $("token").value.replace(/[^!-~]/g, ""); // a pasted line break would make the header invalid
      $("token").value = "";
      form.hidden = true;
      $("files").focus();
      done();
    };
  });
}

// --- the model ------------------------------------------------------------------------------------------------------

async function loadModel() {
  model = await insist("/v1/model");
  $("model-id").textContent = model.model.model_id;
  $("alpha").textContent = number(model.alpha);
  $("meaning").replaceChildren(...model.in_words.map((sentence) => element("li", [sentence])));
  $("model").hidden = false;
  const { formats, max_images, max_bytes } = model.limits;
  const megabytes = number(max_bytes / 2 ** 20);
  $("limits").textContent = `${formats.join(", ")}; up to ${max_images} images at a time, ${megabytes} MB each. They are sent to this server only, which does not keep them.`;
  $("disclaimer").textContent = model.disclaimer;
  $("card-text").replaceChildren(...cardBlocks(model.card));
  $("card").hidden = !model.card;
}

// The few Markdown forms that a model card uses, as elements: headings, tables, lists, paragraphs.
function cardBlocks(markdown) {
  return markdown
    .replace(/^#.*$/gm, "\n$&\n")
    .split(/\n{2,}/)
    .filter((block) => block.trim())
    .map((block) => {
      const lines = block.trim().split("\n");
      const [, heading] = /^(#+) /.exec(lines[0]) ?? [];
      if (heading) return element(heading.length === 1 ? "h2" : "h3", spans(lines[0].slice(heading.length + 1)));
      if (lines[0].startsWith("|")) return cardTable(lines);
      if (!lines[0].startsWith("- ")) return element("p", spans(lines.join(" ")));
      const entries = lines.join("\n").slice(2).split("\n- ");
      return element("ul", entries.map((entry) => element("li", spans(entry.replaceAll("\n", " ")))));
    });
}

function cardTable(lines) {
  const cells = (line) => line.replace(/^\||\|\s*$/g, "").split("|").map((cell) => spans(cell.trim()));
  const row = (kind) => (line) => element("tr", cells(line).map((content) => element(kind, content)));
  const head = element("thead", [row("th")(lines[0])]);
  const table = element("table", [head, element("tbody", lines.slice(2).map(row("td")))]);
  const box = element("div", [table], { className: "scroll", tabIndex: 0 });
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Table of the model card");
  return box;
}

function spans(text) {
  return text.split(/(\*\*.+?\*\*|`.+?`)/).map((part) => {
    if (part.startsWith("**") && part.length > 4) return element("b", spans(part.slice(2, -2)));
    if (part.startsWith("`") && part.length > 2) return element("code", [part.slice(1, -1)]);
    return part;
  });
}

function element(name, children, properties = {}) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// --- adding images --------------------------------------------------------------------------------------------------

function add(files) {
  alertText("");
  const most = model?.limits.max_images ?? 32;
  if (files.length > most) {
    alertText(`${files.length} images are too many: this page takes ${most} at a time. None was sent; choose fewer.`);
    return;
  }
  for (const file of files) {
    const node = $("item").content.firstElementChild.cloneNode(true);
    node.classList.add("waiting");
    node.querySelector("h3").textContent = file.name;
    $("list").append(node);
    items.push({ file, node, outcome: null });
    previews = previews.then(() => preview(file, node));
  }
  $("results").hidden = false;
  if (!$("token-form").hidden) $("token").focus();
  work();
}

async function preview(file, node) {
  const image = new Image();
  const loaded = new Promise((done, failed) => Object.assign(image, { onload: done, onerror: failed }));
  image.src = URL.createObjectURL(file);
  try {
    await loaded;
    const { naturalWidth: width, naturalHeight: height } = image;
    if (!width || width * height > PREVIEW_PIXELS) return;
    const canvas = node.querySelector("canvas");
    const scale = Math.min(1, THUMB / Math.max(width, height));
    [canvas.width, canvas.height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", `Preview of ${file.name}`);
    canvas.hidden = false;
  } catch {
    // The server judges the image although the browser cannot show it.
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

// --- showing verdicts -----------------------------------------------------------------------------------------------

async function work() {
  if (busy) return;
  busy = true;
  $("retry").hidden = $("clear").hidden = true;
  try {
    if (!model) await loadModel();
    for (let group; (group = items.filter((item) => !item.outcome).slice(0, GROUP)).length; ) {
      if (model.auth_required && !token) await tokenGiven("");
      say(`Checking: ${items.length - waiting()} of ${plural(items.length, "image")} done.`);
      await check(group);
    }
    if (items.length) say(summary());
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    say("");
    alertText(sentence(problem));
    $("retry").hidden = false;
  } finally {
    busy = false;
    $("clear").hidden = false;
  }
}

const waiting = () => items.filter((item) => !item.outcome).length;

async function check(group) {
  const form = new FormData();
  const sent = [];
  for (const item of group) {
    const { file } = item;
    const { max_bytes } = model.limits;
    if (file.size > max_bytes) {
      fail(item, { code: "too_large_bytes", message: `The file is larger than ${number(max_bytes / 2 ** 20)} MB; it was not sent.` });
      continue;
    }
    try {
      // Read the file first: otherwise a file that cannot be read would look like a network error.
      form.append("files", new Blob([await file.arrayBuffer()], { type: file.type }), file.name || "image");
      sent.push(item);
    } catch {
      fail(item, { code: "read_failed", message: "The browser cannot read it: a folder, or a file that was moved or changed." });
    }
  }
  if (!sent.length) return;
  try {
    const answer = await insist("/v1/detect", { method: "POST", body: form });
    if (answer.model?.model_id !== model.model.model_id) await loadModel(); // the server was updated meanwhile
    sent.forEach((item, at) => settle(item, answer, answer.results?.[at]));
  } catch (problem) {
    if (!(problem instanceof Problem) || problem.temporary) throw problem;
    if (sent.length === 1) return fail(sent[0], problem);
    for (const item of sent) await check([item]); // a refusal of the group does not say which image caused it
  }
}

function settle(item, answer, result) {
  if (result?.status !== "ok") {
    return fail(item, result?.error ?? { code: "internal", message: "The server's answer lacks this image." });
  }
  const { node } = item;
  outcome(item, result.verdict, VERDICTS[result.verdict] ?? plain(result.verdict));
  scale(node, result.p_value, answer.alpha);
  const limit = number(answer.alpha);
  const notes = [...result.reasons, ...result.warnings].map((code) => WORDS[code]?.(limit) ?? `${plain(code)}.`);
  notes.push(`${result.format}, ${result.width} × ${result.height} pixels.`);
  node.querySelector(".why").replaceChildren(...notes.map((note) => element("li", [note])));
  raw(node, { ...answer, results: [result] });
}

function fail(item, { code, message, requestId }) {
  outcome(item, "error", "not checked");
  const parts = [message, " ", element("code", [code])];
  if (requestId) parts.push(" ", element("code", [requestId]));
  item.node.querySelector(".why").replaceChildren(element("li", parts));
}

function outcome(item, name, words) {
  item.outcome = name;
  item.node.classList.replace("waiting", name in VERDICTS ? name : "error");
  item.node.querySelector(".verdict").textContent = words;
}

const plain = (code) => code.replaceAll("_", " ");

// A logarithmic scale of p-values from 1 / (n + 1), the smallest with n calibration photographs, to 1.
function scale(node, p, alpha) {
  const { calibration_n: n, calibration_sources: sources } = model;
  const place = (value) => `${100 * Math.min(1, Math.max(0, 1 + Math.log(value) / Math.log(n + 1)))}%`;
  const limit = place(alpha);
  const anchor = parseFloat(limit) < 15 ? "start" : parseFloat(limit) > 85 ? "end" : "middle";
  node.querySelector("svg").replaceChildren(
    shape("rect", { class: "axis", x: 0, y: 20, width: "100%", height: 12 }),
    shape("rect", { class: "rare", x: 0, y: 20, width: limit, height: 12 }),
    shape("line", { class: "limit", x1: limit, x2: limit, y1: 15, y2: 37 }),
    shape("text", { x: limit, y: 11, "text-anchor": anchor }, `alpha ${number(alpha)}`),
    shape("circle", { class: "here", cx: place(p), cy: 26, r: 7 }),
  );
  node.querySelector(".ends span").textContent = `p = ${number(1 / (n + 1))}`;
  // The calibration photographs that score as high. With sources of unequal sizes, which weigh the same, it is no count.
  const above = p * (n + 1) - 1;
  const some = sources > 1 ? percent(above / n) : Math.round(above);
  const share = above < 0.01 ? `none of the ${n}` : above > n - 0.01 ? `all ${n}` : `${some} of the ${n}`;
  const verb = above < 0.01 || some === 1 ? "scores" : "score";
  const pooled = sources > 1 ? ", each source weighing the same" : "";
  node.querySelector("figcaption").textContent = `p = ${number(p)}: ${share} calibration photographs ${verb} as high${pooled}. It cannot be below ${number(1 / (n + 1))}.`;
  node.querySelector("figure").hidden = false;
}

function shape(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function raw(node, answer) {
  const details = node.querySelector("details");
  const [text, button] = [details.querySelector("pre"), details.querySelector("button")];
  text.textContent = JSON.stringify(answer, null, 2);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      say("Raw JSON copied.");
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // browsers offer the clipboard only over https
      say("Raw JSON selected; copy it with the keyboard.");
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 3000);
  };
  details.hidden = false;
}

function summary() {
  const counts = [...Object.entries(VERDICTS), ["error", "not checked"]]
    .map(([name, words]) => [items.filter((item) => item.outcome === name).length, words])
    .filter(([count]) => count);
  return `${plural(items.length, "image")}: ${counts.map(([count, words]) => `${count} ${words}`).join(", ")}.`;
}

function sentence({ message, code, requestId }) {
  return requestId ? `${message} (${code}, ${requestId})` : message;
}

function alertText(text) {
  $("alert").textContent = text;
  $("alert").classList.toggle("notice", Boolean(text));
}

// --- user input -----------------------------------------------------------------------------------------------------

$("files").addEventListener("change", ({ target }) => {
  const files = [...target.files];
  target.value = ""; // lets the user choose the same file again
  if (files.length) add(files);
});
$("retry").addEventListener("click", () => {
  alertText("");
  $("files").focus(); // the button disappears and would take the focus with it
  work();
});
$("clear").addEventListener("click", () => {
  items = [];
  $("list").replaceChildren();
  $("results").hidden = true;
  say("");
  alertText("");
  $("files").focus();
});

addEventListener("paste", ({ clipboardData, target }) => {
  const files = [...clipboardData.files];
  if (files.length) add(files);
  else if (target !== $("token")) alertText("The clipboard holds no image.");
});
addEventListener("dragover", (event) => {
  event.preventDefault(); // otherwise the browser would open the file instead of this page
  $("drop").classList.add("over");
});
addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) $("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const files = [...event.dataTransfer.files];
  if (files.length) add(files);
  else alertText("That was no file. Save the image first, then drop the file.");
});

work();
