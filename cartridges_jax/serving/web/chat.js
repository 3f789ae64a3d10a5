// A conversation, with or without a cartridge.
import { $, answer, bytes, count, element, positions, rate, seconds, sendsOnEnter, server } from "./page.js";
import { markdown } from "./markdown.js";

let conversation = [];
let running = null; // the AbortController of the answer that is being written

async function send(question) {
  document.querySelector("#messages .empty")?.remove();
  const asked = element("div", { class: "message user" }, element("div", { class: "said" }, question));
  const said = element("div", { class: "said waiting" });
  const figures = element("p", { class: "figures" });
  const told = element("div", { class: "message assistant" }, said, figures);
  $("messages").append(asked, told);
  scroll(true);
  const messages = [...conversation, { role: "user", content: question }];
  let text = "";
  const show = (all) => { text = all; markdown(said, all); scroll(false); };
  const mine = running = new AbortController();
  busy(true);
  try {
    const made = await answer(messages, $("cartridge").value, show, mine.signal);
    fill(figures, made);
  } catch (error) {
    if (error.name === "AbortError") figures.append(element("span", {}, "stopped"));
    else figures.append(element("span", { class: "error", role: "alert" }, error.message));
  } finally {
    said.classList.remove("waiting");
    if (running === mine) {
      running = null;
      busy(false);
      if (text) conversation = [...messages, { role: "assistant", content: text }];
    }
  }
}

function fill(figures, made) {
  const { usage } = made;
  const slots = usage.prompt_tokens_details.cartridge_tokens;
  const parts = [
    `first token ${seconds(made.firstSeconds)}`,
    made.tokensPerSecond && `${rate(made.tokensPerSecond)} tokens/s`,
    `${slots ? `${count(slots)} slots + ` : ""}${count(usage.total_tokens)} tokens`,
    server.bytesPerToken && `${bytes(positions(usage) * server.bytesPerToken)} of KV`,
    made.ending === "length" && "cut at the limit",
  ];
  figures.append(...parts.filter(Boolean).map((part) => element("span", {}, part)));
}

function scroll(always) {
  const box = $("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

export function startChat() {
  sendsOnEnter($("question"));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (running || !question) return;
    $("question").value = "";
    send(question);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    running?.abort();
    running = null;
    busy(false);
    conversation = [];
    $("messages").replaceChildren(element("p", { class: "empty" }, "A new conversation."));
  });
}
