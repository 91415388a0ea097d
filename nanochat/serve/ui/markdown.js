// Markdown to DOM nodes. Model text only ever becomes text nodes and a fixed set of elements, so
// whatever it contains, nothing in it is run or loaded.

export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role" || key === "for") node.setAttribute(key, value);
    else if (key === "dataset") Object.assign(node.dataset, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

const LINK = /^(https?:\/\/|mailto:)/i;

// The alternatives of one pass over a line, most specific first. Runs are bounded, so that no
// input makes matching slow.
const INLINE = new RegExp(
  [
    "(`{1,3})(?!`)([^\\n]{1,1000}?[^`])\\1(?!`)", // 1, 2: code
    "!?\\[([^\\]\\n]{1,500})\\]\\(([^\\s()]{1,2000})\\)", // 3, 4: link or image
    "(https?:\\/\\/[^\\s<>\"'`)\\]]{1,2000})", // 5: bare link
    "(\\*\\*|__)(?=\\S)([^\\n]{1,400}?\\S)\\6", // 6, 7: strong
    "(?<![\\w*])([*_])(?=[^\\s*_])([^\\n]{0,400}?[^\\s*_])\\8(?![\\w*])", // 8, 9: emphasis
    "~~(?=\\S)([^\\n]{1,400}?\\S)~~", // 10: deleted
    "\\\\([\\\\`*_{}\\[\\]()#+.!~>|-])", // 11: escaped character
  ].join("|"),
  "g",
);

function inline(text, depth = 0) {
  if (depth > 5) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index < end) continue;
    if (match.index > end) nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(element("code", {}, match[2]));
    else if (match[4] !== undefined) nodes.push(link(match[4], inline(match[3], depth + 1), match[0]));
    else if (match[5] !== undefined) {
      const url = match[5].replace(/[.,;:!?]+$/, "");
      end -= match[5].length - url.length;
      nodes.push(link(url, [url], url));
    } else if (match[7] !== undefined) nodes.push(element("strong", {}, ...inline(match[7], depth + 1)));
    else if (match[9] !== undefined) nodes.push(element("em", {}, ...inline(match[9], depth + 1)));
    else if (match[10] !== undefined) nodes.push(element("del", {}, ...inline(match[10], depth + 1)));
    else nodes.push(match[11]);
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function link(url, children, source) {
  // Anything but a plain web or mail address stays text: javascript:, data:, relative paths.
  if (!LINK.test(url)) return source;
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function lines(texts) {
  const nodes = [];
  texts.forEach((text, i) => {
    if (i) nodes.push(element("br"));
    nodes.push(...inline(text));
  });
  return nodes;
}

export function codeBlock(text, language, copy) {
  const button = element("button", { type: "button" }, "Copy code");
  button.addEventListener("click", () => copy(text, button));
  const label = element("div", { className: "label" }, element("span", {}, language), button);
  return element("div", { className: "code" }, label, element("pre", { tabIndex: 0 }, element("code", {}, text)));
}

const BULLET = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

// `copy(text, button)` is what the copy buttons of code blocks do.
export function markdown(source, copy, depth = 0) {
  const fragment = document.createDocumentFragment();
  const rows = source.split("\n");
  let i = 0;
  while (i < rows.length) {
    const row = rows[i];
    const fence = FENCE.exec(row);
    if (!row.trim()) {
      i += 1;
    } else if (fence) {
      const body = [];
      i += 1;
      while (i < rows.length && !rows[i].trimStart().startsWith(fence[1])) body.push(rows[i++]);
      i += 1; // an unclosed block, as it is while it streams, ends with the text
      fragment.append(codeBlock(body.join("\n"), fence[2], copy));
    } else if (/^\s{0,3}#{1,6}\s/.test(row)) {
      const [, marks, text] = /^\s*(#{1,6})\s+(.*?)\s*#*$/.exec(row) || [null, "#", row];
      fragment.append(element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text)));
      i += 1;
    } else if (RULE.test(row)) {
      fragment.append(element("hr"));
      i += 1;
    } else if (/^\s{0,3}>/.test(row) && depth < 8) {
      const body = [];
      while (i < rows.length && /^\s{0,3}>/.test(rows[i])) body.push(rows[i++].replace(/^\s{0,3}>\s?/, ""));
      fragment.append(element("blockquote", {}, markdown(body.join("\n"), copy, depth + 1)));
    } else if (BULLET.test(row) && depth < 8) {
      const [node, next] = list(rows, i, copy, depth);
      fragment.append(node);
      i = next;
    } else if (row.includes("|") && i + 1 < rows.length && rows[i + 1].includes("-") && DIVIDER.test(rows[i + 1])) {
      const body = [];
      const head = row;
      i += 2;
      while (i < rows.length && rows[i].includes("|")) body.push(rows[i++]);
      fragment.append(table(head, body));
    } else {
      const body = [row];
      i += 1;
      while (i < rows.length && rows[i].trim() && !starts(rows[i])) body.push(rows[i++]);
      fragment.append(element("p", {}, ...lines(body)));
    }
  }
  return fragment;
}

function starts(row) {
  return FENCE.test(row) || /^\s{0,3}(#{1,6}\s|>)/.test(row) || BULLET.test(row) || RULE.test(row);
}

function list(rows, i, copy, depth) {
  const [, margin, marker] = BULLET.exec(rows[i]);
  const ordered = /\d/.test(marker);
  const node = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(marker, 10) !== 1) node.start = parseInt(marker, 10);
  while (i < rows.length) {
    const match = BULLET.exec(rows[i]);
    if (!match || match[1].length !== margin.length || /\d/.test(match[2]) !== ordered) break;
    const body = [match[3]];
    i += 1;
    // What is indented more, or a blank line before that, belongs to the item.
    while (i < rows.length) {
      const indent = /^\s*/.exec(rows[i])[0].length;
      const blank = !rows[i].trim();
      const inside = indent > margin.length || (!blank && !starts(rows[i]) && rows[i - 1].trim());
      if (blank ? !(i + 1 < rows.length && /^\s*/.exec(rows[i + 1])[0].length > margin.length) : !inside) break;
      body.push(rows[i].slice(Math.min(indent, margin.length + 2)));
      i += 1;
    }
    const plain = body.every((line) => line.trim() && !starts(line));
    node.append(element("li", {}, ...(plain ? lines(body) : [markdown(body.join("\n"), copy, depth + 1)])));
  }
  return [node, i];
}

function table(head, body) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const names = cells(head);
  const line = (row, kind) =>
    element("tr", {}, ...names.map((_, i) => element(kind, {}, ...inline(cells(row)[i] || ""))));
  return element(
    "div",
    { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" },
    element("table", {}, element("thead", {}, line(head, "th")), element("tbody", {}, ...body.map((r) => line(r, "td")))),
  );
}
