// The same question with nothing, with the cartridge and with the full document, one after the other: side by side in
// time they would slow each other down, and the figures would say nothing.
import { $, answer, begin, bytes, count, element, positions, rate, seconds, sendsOnEnter, server, stopsOnEscape } from "./page.js";
import { markdown } from "./markdown.js";

let running = null;

function columns() {
  const cartridge = $("cartridge").value;
  const text = $("document").value.trim();
  return [
    { name: "No context", note: "the model alone", ready: true, system: null, cartridge: "" },
    { name: "Cartridge", note: cartridge || "choose one on the left", ready: Boolean(cartridge), system: null, cartridge },
    { name: "Full document", note: text ? "in the prompt" : "paste it above", ready: Boolean(text), system: text, cartridge: "" },
  ];
}

function draw({ name, note }) {
  const said = element("div", { class: "said" });
  const measures = element("dl", { class: "measures" });
  const about = element("p", { class: "quiet" }, note);
  const kind = name === "Cartridge" ? "column cartridge" : "column";
  return { box: element("article", { class: kind }, element("h2", {}, name), about, said, measures), said, measures, about };
}

function measure(place, made) {
  const { usage } = made;
  const figures = [
    ["first token", seconds(made.firstSeconds)],
    ["tokens/s", rate(made.tokensPerSecond)],
    ["KV", server.bytesPerToken ? bytes(positions(usage) * server.bytesPerToken) : `${count(positions(usage))}`],
  ];
  place.measures.replaceChildren(...figures.map(([what, value]) =>
    element("div", {}, element("dt", {}, what), element("dd", {}, value))));
  const { cached_tokens: cached, cartridge_tokens: slots } = usage.prompt_tokens_details;
  place.about.textContent += ` · ${slots ? `${count(slots)} slots + ` : ""}${count(usage.prompt_tokens)} prompt tokens`
    + (cached ? `, ${count(cached)} of them known from before` : "");
}

async function compare(question) {
  running = new AbortController();
  busy(true);
  await begin().catch(() => null); // what fails here fails again below, beside each answer
  const wanted = columns();
  const places = wanted.map(draw);
  $("columns").replaceChildren(...places.map((place) => place.box));
  for (const [i, column] of wanted.entries()) {
    const place = places[i];
    if (!column.ready || running.signal.aborted) continue;
    const system = column.system ? [{ role: "system", content: column.system }] : [];
    place.said.classList.add("waiting");
    try {
      const messages = [...system, { role: "user", content: question }];
      measure(place, await answer(messages, column.cartridge, (text) => markdown(place.said, text), running.signal));
    } catch (error) {
      const text = error.name === "AbortError" ? "stopped" : error.message;
      place.said.append(element("p", { class: "error", role: "alert" }, text));
    }
    place.said.classList.remove("waiting");
  }
  running = null;
  busy(false);
}

function busy(is) {
  $("send-all").hidden = is;
  $("stop-all").hidden = !is;
  if (!is) $("same").focus();
}

export function startCompare() {
  const draft = () => $("columns").replaceChildren(...columns().map((column) => draw(column).box));
  sendsOnEnter($("same"));
  $("ask-all").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("same").value.trim();
    if (!running && question) compare(question);
  });
  const stop = () => running?.abort();
  $("stop-all").addEventListener("click", stop);
  stopsOnEscape(stop);
  $("document").addEventListener("input", () => {
    const length = $("document").value.length;
    $("size").textContent = length ? `${count(length)} characters` : "none given";
    if (!running) draft();
  });
  $("cartridge").addEventListener("change", () => { if (!running) draft(); });
  draft();
}
