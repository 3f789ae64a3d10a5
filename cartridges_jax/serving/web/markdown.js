// Markdown that models write, as elements: text is only ever set as text, so nothing in an answer can become markup.
// Blocks: paragraphs, headings, lists, fenced code, quotes, tables, rules. Inline: code, bold, italics. Links stay text.
import { element } from "./page.js";

const FENCE = /^\s*(```+|~~~+)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const ROW = /^\s*\|(.*)\|\s*$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const INLINE = /(`+)([^`]+?)\1|\*\*(?=\S)([\s\S]+?\S)\*\*|__(?=\S)([\s\S]+?\S)__|\*(?=[^\s*])([^*]*?[^\s*])\*|(?<![\w])_(?=\S)([^_]*?\S)_(?!\w)/;

export function markdown(place, text) {
  place.replaceChildren(...blocks(text.split("\n")));
}

function blocks(lines) {
  const made = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) {
      i += 1;
    } else if (FENCE.test(line)) {
      const fence = FENCE.exec(line)[1];
      const end = lines.findIndex((other, j) => j > i && other.trim().startsWith(fence));
      const stop = end < 0 ? lines.length : end;
      made.push(element("pre", {}, element("code", {}, lines.slice(i + 1, stop).join("\n"))));
      i = stop + 1;
    } else if (heading) {
      made.push(inline(element(`h${Math.min(4, heading[1].length + 1)}`, {}), heading[2]));
      i += 1;
    } else if (RULE.test(line)) {
      made.push(element("hr", {}));
      i += 1;
    } else if (/^\s*>/.test(line)) {
      const [inside, next] = taken(lines, i, (other) => /^\s*>/.test(other));
      made.push(element("blockquote", {}, ...blocks(inside.map((other) => other.replace(/^\s*> ?/, "")))));
      i = next;
    } else if (ROW.test(line) && ROW.test(lines[i + 1] ?? "") && /^[\s|:-]+$/.test(lines[i + 1])) {
      const [rows, next] = taken(lines, i, (other) => ROW.test(other));
      made.push(table(rows));
      i = next;
    } else if (ITEM.test(line)) {
      const [items, next] = taken(lines, i, (other) => ITEM.test(other) || /^\s{2,}\S/.test(other));
      made.push(list(items));
      i = next;
    } else {
      const ends = (other) => !other.trim() || FENCE.test(other) || ITEM.test(other) || /^(#{1,6}\s|\s*>)/.test(other);
      const [inside, next] = taken(lines, i, (other, j) => j === i || !ends(other));
      made.push(inline(element("p", {}), inside.join("\n")));
      i = next;
    }
  }
  return made;
}

function taken(lines, start, belongs) {
  let end = start;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return [lines.slice(start, end), end];
}

function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul", ordered && parseInt(mark, 10) !== 1 ? { start: parseInt(mark, 10) } : {});
  for (let i = 0; i < lines.length;) {
    const text = ITEM.exec(lines[i])?.[3] ?? lines[i].trim();
    const [inside, next] = taken(lines, i + 1, (other) => (ITEM.exec(other)?.[1] ?? "  ").length > indent.length);
    const under = inside.length && ITEM.test(inside[0]) ? [list(inside)] : [];
    const item = inline(element("li", {}), under.length ? text : [text, ...inside.map((other) => other.trim())].join(" "));
    item.append(...under);
    made.append(item);
    i = next;
  }
  return made;
}

function table(rows) {
  const cells = (row, name) => element("tr", {}, ...ROW.exec(row)[1].split("|").map((cell) =>
    inline(element(name, {}), cell.trim())));
  const [head, , ...body] = rows;
  return element("table", {}, element("thead", {}, cells(head, "th")), element("tbody", {}, ...body.map((row) => cells(row, "td"))));
}

function inline(place, text) {
  let rest = text;
  for (let match = INLINE.exec(rest); match; match = INLINE.exec(rest)) {
    place.append(rest.slice(0, match.index));
    const [, , code, bold, strong, italic, emphasis] = match;
    if (code !== undefined) place.append(element("code", {}, code));
    else if (bold ?? strong) place.append(inline(element("strong", {}), bold ?? strong));
    else place.append(inline(element("em", {}), italic ?? emphasis));
    rest = rest.slice(match.index + match[0].length);
  }
  place.append(rest);
  return place;
}
