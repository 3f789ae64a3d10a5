// The summary: figures, counts and histograms, drawn as tables and SVG.
import { element, fill, filterBy, percent } from "./view.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [400, 150, 44, 20, 8];

export function drawSummary(place, summary) {
  const finished = Object.fromEntries(summary.endings);
  const figures = [
    ["conversations", summary.total.toLocaleString("en")],
    ["tokens per question", summary.question_tokens.mean],
    ["tokens per answer", summary.answer_tokens.mean],
    ["cut at the limit", percent((finished.length ?? 0) / Math.max(1, summary.total))],
    ["model", summary.models.map(([name]) => name).join(", ") || "unknown"],
  ];
  const probabilities = summary.probabilities;
  fill(place,
    element("dl", { class: "figures" }, ...figures.map(([what, value]) =>
      element("div", {}, element("dt", {}, what), element("dd", {}, String(value))))),
    element("div", { class: "charts" },
      counts("Seed types", "Choose one to see its conversations.", summary.types, filterBy),
      counts("Resources", "What the contexts were taken from.", summary.resources),
      histogram("Answers", "How many answers have how many tokens.", bars(summary.answer_tokens), tokens),
      histogram("Questions", "How many questions have how many tokens.", bars(summary.question_tokens), tokens),
      probabilities.some(Boolean) ? histogram("Certainty", "Tokens of a sample's answers by the teacher's own probability.",
        probabilities.map((count, i) => [i / 10, (i + 1) / 10, count]), percent) : null,
      ...Object.entries(summary.coverage).filter(([, seen]) => seen.length).slice(0, 12).map(([name, seen]) =>
        histogram(`Coverage${name && summary.resources.length > 1 ? ` of ${name}` : ""}`, "How often each part of the text, from its beginning to its end, was in a context.",
          seen.map((count, i) => [i / seen.length, (i + 1) / seen.length, count]), percent)),
      counts("Endings", "Why the last answers ended.", summary.endings)));
}

const tokens = (value) => value.toLocaleString("en");
const bars = ({ width, counts }) => counts.map((count, i) => [i * width, (i + 1) * width, count]);

function counts(title, caption, pairs, choose) {
  const most = Math.max(1, ...pairs.map(([, count]) => count));
  const rows = pairs.slice(0, 20).map(([name, count]) => {
    let label = name || "unnamed";
    if (choose) {
      label = element("a", { href: "#/" }, label);
      label.addEventListener("click", (event) => { event.preventDefault(); choose(name); });
    }
    return element("tr", {}, element("td", {}, label), element("td", {}, count.toLocaleString("en")),
      element("td", {}, element("span", { class: "bar", "--share": count / most })));
  });
  const more = pairs.length > 20 ? element("p", { class: "note" }, `and ${pairs.length - 20} more`) : null;
  return chart(title, caption, element("table", { class: "counts" }, element("tbody", {}, ...rows)), more);
}

function histogram(title, caption, values, label) {
  const most = Math.max(1e-9, ...values.map(([, , count]) => count));
  const [low, high] = [values[0]?.[0] ?? 0, values.at(-1)?.[1] ?? 1];
  const x = (value) => LEFT + ((value - low) / (high - low)) * (WIDTH - LEFT - 6);
  const y = (count) => TOP + (1 - count / most) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const share of [0, 0.5, 1]) {
    svg.append(shape("line", { class: "axis", x1: LEFT, x2: WIDTH - 6, y1: y(share * most), y2: y(share * most) }),
      text(LEFT - 5, y(share * most) + 4, "end", short(share * most)));
  }
  for (const [from, to, count] of values) {
    const bar = shape("rect", { class: "bar", x: x(from) + 0.5, width: Math.max(0.5, x(to) - x(from) - 1), y: y(count), height: y(0) - y(count) });
    bar.append(shape("title", {}, `${label(from)} to ${label(to)}: ${count.toLocaleString("en")}`));
    svg.append(bar);
  }
  svg.append(text(LEFT, HEIGHT - 5, "start", label(low)), text(WIDTH - 6, HEIGHT - 5, "end", label(high)),
    text((LEFT + WIDTH - 6) / 2, HEIGHT - 5, "middle", label((low + high) / 2)));
  return chart(title, caption, svg);
}

function chart(title, caption, ...content) {
  return element("figure", { class: "chart" },
    element("figcaption", {}, element("h2", {}, title), element("p", {}, caption)), ...content);
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const text = (x, y, anchor, words) => shape("text", { x, y, "text-anchor": anchor }, words);
const short = (value) => value >= 10000 ? `${Math.round(value / 1000)}k` : value >= 10 || value === 0 ? Math.round(value).toLocaleString("en") : value.toPrecision(2);
