// A conversation, with or without a cartridge.
import { $, answer, begin, bytes, count, element, positions, rate, seconds, sendsOnEnter, server, stopsOnEscape } from "./page.js";
import { markdown } from "./markdown.js";

const FULL = "The context is full: the model no longer knows what stands above this line.";

let turns = []; // those that the model is told: question, answer, and where they stand on the page
let running = null; // the AbortController of the answer that is being written

async function send(question) {
  document.querySelector("#messages .empty")?.remove();
  $("problem").textContent = "";
  const turn = draw(question);
  scroll(true);
  const mine = running = new AbortController();
  busy(true);
  try {
    fill(turn.figures, await answerWhatFits(turn, mine.signal));
  } catch (error) {
    if (error.name === "AbortError") turn.figures.append(element("span", {}, "stopped"));
    else if (turn.answer) turn.figures.append(element("span", { class: "error", role: "alert" }, error.message));
    else takeBack(turn, error.message);
  } finally {
    turn.said.classList.remove("waiting");
    if (running === mine) {
      running = null;
      busy(false);
      if (turn.answer) turns.push(turn);
    }
  }
}

function draw(question) {
  const said = element("div", { class: "said waiting" });
  const figures = element("p", { class: "figures" });
  const asked = element("div", { class: "message user" }, element("div", { class: "said" }, question));
  const box = element("div", {}, asked, element("div", { class: "message assistant" }, said, figures));
  $("messages").append(box);
  return { question, answer: "", box, said, figures };
}

// Asks with as much of the conversation as fits the model's context: its oldest turns are left out first.
async function answerWhatFits(turn, signal) {
  const show = (all) => { turn.answer = all; markdown(turn.said, all); scroll(false); };
  for (;;) {
    const told = turns.flatMap(({ question, answer: said }) => [
      { role: "user", content: question }, { role: "assistant", content: said }]);
    try {
      await begin();
      return await answer([...told, { role: "user", content: turn.question }], $("cartridge").value, show, signal);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || !turns.length) throw error;
      turns.shift();
      document.querySelector("#messages .full")?.remove();
      (turns[0] ?? turn).box.before(element("p", { class: "full quiet", role: "status" }, FULL));
    }
  }
}

// A question that got no answer goes back into its field, and why stands beside it.
function takeBack(turn, why) {
  if (!turn.box.isConnected) return; // the conversation was cleared meanwhile
  turn.box.remove();
  $("question").value ||= turn.question;
  $("problem").textContent = why;
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
  if (!is) $("question").focus();
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
  const stop = () => running?.abort();
  $("stop").addEventListener("click", stop);
  stopsOnEscape(stop);
  $("clear").addEventListener("click", () => {
    stop();
    running = null;
    turns = [];
    $("problem").textContent = "";
    $("messages").replaceChildren(element("p", { class: "empty" }, "A new conversation."));
    busy(false);
  });
}
