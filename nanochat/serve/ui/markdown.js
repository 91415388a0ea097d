// Markdown to DOM nodes. Model text only ever becomes text nodes and a fixed set of elements, so
// whatever it contains, nothing in it is run or loaded.

import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";

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

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
// Anything but a plain web or mail address stays text: javascript:, data:, relative paths.
parser.validateLink = (url) => /^(https?:\/\/|mailto:)/i.test(url);
parser.inline.ruler.before("escape", "math", inlineMath);
parser.block.ruler.before("fence", "math_block", blockMath, { alt: ["paragraph", "list", "blockquote"] });

const LONGEST_FORMULA = 2000;
const LONGEST_HIGHLIGHTED = 20000;
const MATH = [["\\(", "\\)"], ["\\[", "\\]"], ["$$", "$$"], ["$", "$"]];

function inlineMath(state, silent) {
  const { src, pos } = state;
  const marks = MATH.find(([open]) => src.startsWith(open, pos));
  if (!marks) return false;
  const [open, close] = marks;
  const start = pos + open.length;
  const length = src.slice(start, Math.min(state.posMax, start + LONGEST_FORMULA)).indexOf(close);
  const tex = src.slice(start, start + length);
  if (length < 1 || !tex.trim()) return false;
  if (open === "$" && isMoney(src[pos - 1] || " ", tex, src[start + length + 1] || " ")) return false;
  if (!silent) Object.assign(state.push("math", "", 0), { content: tex, meta: { display: open === "$$" || open === "\\[", source: open + tex + close } });
  state.pos = start + length + close.length;
  return true;
}

// A single dollar is mostly money: "$5 and $10", "2*$3=$6", "$5, sells for 7$".
function isMoney(before, tex, after) {
  return /[\w$]/.test(before) || /^\s|\s$/.test(tex) || /[\w$]/.test(after) || /^[\d.,]+ ?[^\\]*\s[a-z]{2}/i.test(tex);
}

// Lines from $$ to $$, or from \[ to \]: between them nothing else is markdown.
function blockMath(state, first, last, silent) {
  const line = (i) => state.src.slice(state.bMarks[i] + state.tShift[i], state.eMarks[i]).trimEnd();
  const marks = MATH.slice(1, 3).find(([open]) => line(first).startsWith(open));
  if (!marks || state.sCount[first] - state.blkIndent >= 4) return false;
  const [open, close] = marks;
  const body = [];
  for (let i = first; i < last && i < first + 100; i += 1) {
    const text = i === first ? line(i).slice(open.length) : line(i);
    body.push(text);
    if (!text.endsWith(close)) continue;
    const tex = body.join("\n").slice(0, -close.length);
    if (!tex.trim() || tex.length > LONGEST_FORMULA || tex.includes(close)) return false;
    if (!silent) {
      Object.assign(state.push("math", "", 0), { content: tex, meta: { display: true, source: open + tex + close } });
      state.line = i + 1;
    }
    return true;
  }
  return false;
}

export function markdown(source) {
  const fragment = document.createDocumentFragment();
  build(parser.parse(source, {}), fragment);
  return fragment;
}

function build(tokens, root) {
  const open = [root];
  const add = (...nodes) => open[open.length - 1].append(...nodes);
  for (const token of tokens) {
    if (token.hidden) continue; // the paragraphs of a list without blank lines
    if (token.nesting === 1) {
      const node = opening(token);
      if (token.tag === "table") add(element("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, node));
      else add(node);
      open.push(node);
    } else if (token.nesting === -1) open.pop();
    else if (token.type === "inline") build(token.children, open[open.length - 1]);
    else if (token.type === "text") add(token.content);
    else if (token.type === "softbreak" || token.type === "hardbreak") add(element("br"));
    else if (token.type === "code_inline") add(element("code", {}, token.content));
    else if (token.type === "fence" || token.type === "code_block") add(codeBlock(token.content.replace(/\n$/, ""), token.info.trim().split(/\s/)[0]));
    else if (token.type === "math") add(formula(token.content, token.meta));
    else if (token.type === "hr") add(element("hr"));
    else if (token.type === "image") add(link(token.attrGet("src"), token.content || "image"));
    else add(token.content);
  }
}

const ELEMENTS = new Set(["p", "blockquote", "ul", "ol", "li", "strong", "em", "s", "table", "thead", "tbody", "tr", "th", "td"]);

function opening(token) {
  if (token.tag === "a") return link(token.attrGet("href"));
  // The page itself has the first two levels.
  if (/^h\d$/.test(token.tag)) return element(`h${Math.min(6, Number(token.tag[1]) + 2)}`);
  const node = element(ELEMENTS.has(token.tag) ? token.tag : "span");
  if (token.tag === "ol" && token.attrGet("start")) node.start = Number(token.attrGet("start"));
  const side = /right|center/.exec(token.attrGet("style") || "");
  if (side) node.className = side[0];
  return node;
}

function link(url, ...children) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

// Code and formulas: their libraries come when the first answer needs them.

let changed = () => {};
const libraries = { highlight: null, katex: null };

// `callback` is called when a library has come, and what was shown can be shown better.
export function whenBetter(callback) {
  changed = callback;
}

const loaders = {
  highlight: async () => (await import("./vendor/highlight.min.js")).default,
  katex: async () => {
    const address = (file) => new URL(`./vendor/${file}`, import.meta.url).href;
    const parts = [element("link", { rel: "stylesheet", href: address("katex.min.css") }), element("script", { src: address("katex.min.js") })];
    await Promise.all(parts.map((node) => new Promise((resolve, reject) => {
      node.onload = resolve;
      node.onerror = reject;
      document.head.append(node);
    })));
    return window.katex;
  },
};

function library(name) {
  const load = loaders[name];
  if (load) {
    delete loaders[name];
    load().then((found) => {
      libraries[name] = found;
      changed();
    }, () => {}); // without it the text is shown as it is
  }
  return libraries[name];
}

const drawn = new Map();

// A copy of what `draw` made of this key before.
function remembered(key, draw) {
  if (!drawn.has(key)) {
    if (drawn.size > 200) drawn.delete(drawn.keys().next().value);
    drawn.set(key, draw());
  }
  return drawn.get(key).cloneNode(true);
}

function formula(tex, { display, source }) {
  const katex = library("katex");
  if (!katex) return element("span", { className: "math" }, source);
  return remembered(`math ${display} ${tex}`, () => {
    const node = element("span", { className: display ? "math display" : "math" });
    try {
      katex.render(tex, node, { displayMode: display, throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200 });
    } catch {
      node.replaceChildren(source);
    }
    return node;
  });
}

export function codeBlock(text, language) {
  const button = element("button", { type: "button", dataset: { action: "copy-code" } }, "Copy code");
  const label = element("div", { className: "label" }, element("span", {}, language), button);
  return element("div", { className: "code" }, label, element("pre", { tabIndex: 0 }, highlighted(text, language)));
}

export function highlighted(text, language) {
  const code = element("code");
  const highlight = language && text.length <= LONGEST_HIGHLIGHTED ? library("highlight") : null;
  if (!highlight?.getLanguage(language)) {
    code.append(text);
    return code;
  }
  return remembered(`code ${language} ${text}`, () => {
    const { value } = highlight.highlight(text, { language, ignoreIllegals: true });
    copySpans(new DOMParser().parseFromString(value, "text/html").body, code);
    return code;
  });
}

function copySpans(from, to) {
  for (const node of from.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) to.append(node.data);
    else {
      const span = element("span", { className: node.className });
      copySpans(node, span);
      to.append(span);
    }
  }
}
