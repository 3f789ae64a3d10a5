// What both views share: the API, the choice of a cartridge, figures. The page asks the server that gave it, nobody else.
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";

export const $ = (id) => document.getElementById(id);
export const server = { model: "", bytesPerToken: 0 };

export function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const GONE = "The server cannot be reached: it may have been stopped. Send again when it runs.";

// Throws an Error whose message is for people, with the API's `code` if the server gave one.
async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch(broken);
  if (response.ok) return response;
  if (response.status === 401) askForKey(key);
  const { error } = (await response.json().catch(() => null)) ?? {};
  const message = response.status === 401 ? "The server wants its API key: give it above, then send again." : error?.message;
  throw Object.assign(new Error(message ?? `the server answers ${response.status}`), { code: error?.code });
}

// What a browser says when a connection fails is for programmers.
function broken(error) {
  throw error.name === "AbortError" ? error : new Error(GONE);
}

function askForKey(refused) {
  $("login").hidden = false;
  $("refused").textContent = refused ? "The server does not know this key: check it, and try again." : "";
  $("key").select();
}

// Streams an answer: calls `show(text so far)` as it comes; resolves to the text and what it took.
export async function answer(messages, cartridge, show, signal) {
  const body = {
    model: server.model, messages, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("max").value) || 256, temperature: Number($("temperature").value) || 0,
    ...(cartridge ? { cartridges: [{ id: cartridge, source: "local" }] } : {}),
  };
  const start = performance.now();
  const response = await ask("/v1/chat/completions", body, signal);
  const made = { text: "", firstSeconds: null, tokensPerSecond: null, usage: null, ending: null };
  let [first, last, pieces] = [null, null, 0];
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) made.usage = event.usage;
    const choice = event.choices?.[0];
    made.ending = choice?.finish_reason ?? made.ending;
    if (!choice?.delta?.content) continue;
    last = performance.now();
    first ??= last;
    pieces += 1;
    made.text += choice.delta.content;
    show(made.text);
  }
  if (first !== null) made.firstSeconds = (first - start) / 1000;
  const count = Math.min(pieces, made.usage?.completion_tokens ?? pieces) - 1;
  if (count > 0 && last > first) made.tokensPerSecond = (1000 * count) / (last - first);
  return made;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let ended = false;
  const read = () => reader.read().catch(broken);
  for (let part = await read(); !part.done; part = await read()) {
    const lines = (held + part.value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") ended = true;
      else yield JSON.parse(data);
    }
  }
  if (!ended) throw new Error(GONE);
}

// Positions of the KV cache that an answer needed: cartridge, prompt and answer.
export function positions(usage) {
  return usage.total_tokens + (usage.prompt_tokens_details.cartridge_tokens ?? 0);
}

export const seconds = (value) => value === null ? "–" : value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
export const rate = (value) => value === null ? "–" : value.toFixed(value < 10 ? 1 : 0);
export const count = (value) => value.toLocaleString("en");

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB"];
  let i = 0;
  for (; value >= 1000 && i < units.length - 1; i += 1) value /= 1000;
  return `${value >= 100 || i === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[i]}`;
}

// Enter sends, Shift+Enter begins a line.
export function sendsOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
}

export function stopsOnEscape(stop) {
  addEventListener("keydown", (event) => { if (event.key === "Escape" && !event.isComposing) stop(); });
}

async function describe() {
  const id = $("cartridge").value;
  $("about").replaceChildren();
  if (!id) return;
  try {
    const found = await (await ask("/v1/cartridges/load", { id, source: "local" })).json();
    if ($("cartridge").value !== id) return;
    const from = found.provenance ?? {};
    const facts = [
      ["slots", count(found.slots)
        + (found.longest_head > found.slots ? ` on average, ${count(found.longest_head)} at most` : "")],
      ["in memory", bytes(found.bytes ?? 0)],
      ["made by", from.recipe],
      ["training", from.training_tokens && `${count(from.training_tokens)} tokens`],
      ["version", found.version],
    ];
    $("about").replaceChildren(...facts.filter(([, value]) => value).map(([what, value], i) =>
      element("div", i > 1 ? { class: "more" } : {}, element("dt", {}, what), element("dd", {}, String(value)))));
  } catch (error) {
    $("about").replaceChildren(element("div", { class: "error", role: "alert" }, error.message));
  }
}

function route() {
  const view = location.hash === "#compare" ? "compare" : "chat";
  for (const name of ["chat", "compare"]) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $(view === "compare" ? "same" : "question").focus();
}

// Says how far a server is that compiles its programs still: it answers all the same, later.
async function watchStart() {
  const health = await fetch("/health").catch(() => null);
  if (!health) return; // the next question will say so
  const { status, programs, compiled, seconds_left: left } = await health.json();
  $("starting").hidden = status !== "starting";
  if (status !== "starting") return;
  $("starting").textContent = `The server is starting: ${compiled} of ${programs} programs are compiled`
    + `${left === null ? "" : `, about ${Math.ceil(left)} s left`}. What you ask is answered then.`;
  setTimeout(watchStart, 1000);
}

let known = null; // the promise of what the page has to know before it asks; none after a failure

export function begin() {
  known ??= start().catch((error) => { known = null; throw error; });
  return known;
}

async function start() {
  const models = (await (await ask("/v1/models")).json()).data;
  $("login").hidden = true;
  $("problem").textContent = "";
  server.model = models[0].id;
  server.bytesPerToken = models[0].kv_bytes_per_token;
  $("model").textContent = server.model;
  const { data } = await (await ask("/v1/cartridges")).json();
  const names = data.filter((cartridge) => cartridge.source === "local").map((cartridge) => cartridge.id);
  const chosen = $("cartridge").disabled ? names[0] ?? "" : $("cartridge").value; // a choice outlives a new key
  $("cartridge").replaceChildren(...["", ...names].map((name) => element("option", { value: name }, name || "none")));
  $("cartridge").value = names.includes(chosen) ? chosen : "";
  $("cartridge").disabled = false;
  describe();
  const given = await ask("/document").catch(() => null);
  if (given) $("document").value ||= await given.text();
  $("document").dispatchEvent(new Event("input"));
}

$("cartridge").addEventListener("change", describe);
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  known = null;
  begin().then(route).catch(complain);
});
addEventListener("hashchange", route);

function complain(error) {
  if ($("login").hidden) $("problem").textContent = error.message;
}

startChat();
startCompare();
route();
watchStart();
begin().catch(complain);
