// The page: a list with search and filter, one conversation, a summary. Text reaches the page as text only.
import { drawSummary } from "./charts.js";

const PAGE_SIZE = 50;
const $ = (id) => document.getElementById(id);
const state = { type: "", search: "", context: false, offset: 0, matches: 0, places: [], place: null };
let summary = null;
let latest = 0; // of the requests for a list: an answer to an older one is too late

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("--")) made.style.setProperty(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function fill(place, ...children) {
  place.replaceChildren(...children.filter((child) => child != null));
}

async function ask(path) {
  const reply = await fetch(path);
  if (!reply.ok) throw new Error((await reply.text()) || reply.statusText);
  return reply.json();
}

async function showList() {
  const mine = ++latest;
  const query = new URLSearchParams({ offset: state.offset, limit: PAGE_SIZE, type: state.type, search: state.search });
  if (state.context) query.set("context", "1");
  $("list").setAttribute("aria-busy", "true");
  const found = await ask(`api/conversations?${query}`);
  if (mine !== latest) return;
  $("list").removeAttribute("aria-busy");
  state.matches = found.matches;
  state.places = found.rows.map((row) => row.place);
  const asked = state.type || state.search;
  $("matches").textContent = asked
    ? `${found.matches.toLocaleString("en")} of ${summary.total.toLocaleString("en")} conversations`
    : `${summary.total.toLocaleString("en")} conversations`;
  $("rows").replaceChildren(...found.rows.map(listed));
  $("rows").scrollTop = 0;
  const pages = Math.max(1, Math.ceil(found.matches / PAGE_SIZE));
  $("page").textContent = `${(state.offset / PAGE_SIZE + 1).toLocaleString("en")} / ${pages.toLocaleString("en")}`;
  $("previous").disabled = state.offset === 0;
  $("next").disabled = state.offset + PAGE_SIZE >= found.matches;
  mark();
}

function listed(row) {
  return element("li", {}, element("a", { href: `#/${row.place}`, "data-place": row.place },
    element("div", { class: "meta" },
      element("span", {}, `#${row.place}`),
      element("span", { class: "kind" }, row.type),
      element("span", {}, row.tokens ? `${row.tokens} tokens` : "")),
    element("div", { class: "question" }, row.texts[0] ?? ""),
    element("div", { class: "answer" }, row.texts[1] ?? "")));
}

function mark() {
  for (const link of $("rows").querySelectorAll("a")) {
    const isShown = Number(link.dataset.place) === state.place;
    if (isShown) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    if (isShown) link.scrollIntoView({ block: "nearest" });
  }
}

async function showConversation(place) {
  const made = await ask(`api/conversations/${place}`);
  if (state.place !== place) return;
  hideTip();
  const { seed_prompt, ...rest } = made.metadata;
  const go = (step, label) => {
    const target = state.places.includes(place) ? state.places[state.places.indexOf(place) + step] : place + step;
    const isThere = target != null && target >= 0 && target < summary.total;
    const button = element("button", { type: "button", title: `${label} conversation`, disabled: !isThere }, step < 0 ? "↑" : "↓");
    button.addEventListener("click", () => { location.hash = `#/${target}`; });
    return button;
  };
  fill($("conversation"),
    element("div", { class: "top" },
      element("a", { class: "back", href: "#/" }, "← All"),
      element("h2", {}, `Conversation ${made.place}`),
      element("span", { class: "kind" }, made.type),
      element("span", { class: "steps" }, go(-1, "Previous"), go(1, "Next"))),
    folded("Context", element("div", { class: "text context" }, made.system_prompt || "none")),
    seed_prompt ? folded("Seed prompt", element("div", { class: "text context" }, String(seed_prompt))) : null,
    folded("Metadata", element("div", {}, element("dl", {}, ...Object.entries(rest).flatMap(([key, value]) => [
      element("dt", {}, key), element("dd", {}, typeof value === "string" ? value : JSON.stringify(value))])))),
    ...made.messages.map(message));
  $("conversation").scrollTop = 0;
  mark();
}

function folded(title, content) {
  const made = element("details", {}, element("summary", {}, title), content);
  made.open = sessionStorage.getItem(title) === "open"; // as it was left in the conversation before
  made.addEventListener("toggle", () => sessionStorage.setItem(title, made.open ? "open" : ""));
  return made;
}

function message(said) {
  const role = element("div", { class: "role" }, said.role);
  const made = element("div", { class: `message ${said.role === "user" ? "user" : "other"}` }, role);
  if (!said.tokens) {
    made.append(element("div", { class: "text" }, said.content));
    return made;
  }
  role.append(element("span", { class: "scale" }, "unlikely", element("i"), "certain"));
  const spell = summary.has_texts && said.aligned;
  if (!spell) made.append(element("div", { class: "text" }, said.content));
  const text = element("div", { class: "text tokens" }, ...said.tokens.map((token) => drawn(token, spell)));
  made.append(text);
  if (!summary.has_texts) made.append(element("p", { class: "note" }, "Token ids only: start the page with --tokenizer to see their texts."));
  else if (!said.aligned) made.append(element("p", { class: "note" }, "This tokenizer's texts do not spell the message: it may be another model's."));
  return made;
}

function drawn(token, spell) {
  const kinds = ["token", token.special && "special", !spell && "id", token.top?.length && token.top[0][1] !== token.id && "other"];
  const made = element("span", { class: kinds.filter(Boolean).join(" "), "--p": token.p ?? 1 }, token.text);
  made.addEventListener("pointerenter", () => showTip(made, token));
  made.addEventListener("pointerleave", hideTip);
  made.addEventListener("click", () => showTip(made, token));
  return made;
}

function showTip(where, token) {
  hideTip();
  where.classList.add("pinned");
  const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const rows = (token.top ?? []).slice(0, 12).map(([text, id, p]) => element("tr", { class: id === token.id && "own" },
    element("td", { title: id }, shown(text)), element("td", {}, percent(p)),
    element("td", {}, element("span", { class: "bar", "--p": p }))));
  const unlikely = token.top && !token.top.some(([, id]) => id === token.id);
  fill($("tip"),
    rows.length ? element("table", {}, element("tbody", {}, ...rows)) : element("span", {}, "no probabilities were given"),
    unlikely ? element("p", { class: "note" }, `${shown(token.text)} was sampled from the rest`) : null,
    element("p", { class: "note" }, `token ${token.id}`));
  $("tip").hidden = false;
  const [spot, tip] = [where.getClientRects()[0] ?? where.getBoundingClientRect(), $("tip").getBoundingClientRect()];
  const below = spot.bottom + 6 + tip.height < innerHeight;
  $("tip").style.left = `${Math.max(8, Math.min(spot.left, innerWidth - tip.width - 8))}px`;
  $("tip").style.top = `${Math.max(8, below ? spot.bottom + 6 : spot.top - tip.height - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
  for (const token of document.querySelectorAll(".token.pinned")) token.classList.remove("pinned");
}

export function percent(p) {
  return p >= 0.1 || p === 0 ? `${(100 * p).toFixed(0)}%` : `${(100 * p).toPrecision(2)}%`;
}

export function filterBy(type) {
  $("type").value = state.type = type;
  state.offset = 0;
  location.hash = "#/";
  showList().catch(complain);
}

function route() {
  const where = location.hash.replace(/^#\/?/, "");
  const view = where === "summary" ? "summary" : /^\d+$/.test(where) ? "one" : "list";
  document.querySelector("main").dataset.view = view;
  $("summary").hidden = view !== "summary";
  $("list").hidden = $("conversation").hidden = view === "summary";
  for (const link of document.querySelectorAll("nav a")) {
    if ((link.dataset.view === "summary") === (view === "summary")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  hideTip();
  if (view === "one") {
    state.place = Number(where);
    showConversation(state.place).catch(complain);
  } else if (view === "list" && state.place === null) {
    $("conversation").replaceChildren(element("p", { class: "empty" }, "Choose a conversation. Arrow keys go through them."));
  }
}

function complain(error) {
  $("conversation").replaceChildren(element("p", { class: "empty", role: "alert" }, error.message));
}

function turnPage(step) {
  state.offset = Math.max(0, state.offset + step * PAGE_SIZE);
  showList().catch(complain);
}

async function start() {
  summary = await ask("api/summary");
  document.title = $("name").textContent = summary.name;
  $("type").append(element("option", { value: "" }, "all seed types"),
    ...summary.types.map(([type, count]) => element("option", { value: type }, `${type} (${count.toLocaleString("en")})`)));
  drawSummary($("summary"), summary);
  await showList();
  route();
}

let typing;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    Object.assign(state, { search: $("search").value, offset: 0 });
    showList().catch(complain);
  }, 250);
});
$("context").addEventListener("change", () => {
  Object.assign(state, { context: $("context").checked, offset: 0 });
  showList().catch(complain);
});
$("type").addEventListener("change", () => filterBy($("type").value));
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("previous").addEventListener("click", () => turnPage(-1));
$("next").addEventListener("click", () => turnPage(1));
addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  if (event.target.closest("input, select, textarea") || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
  if (document.querySelector("main").dataset.view === "summary") return;
  event.preventDefault();
  const at = state.places.indexOf(state.place);
  const next = state.places[at + (event.key === "ArrowDown" ? 1 : -1)];
  if (next != null) location.hash = `#/${next}`;
});
start().catch(complain);
