// The chat page: conversations live in this browser, the server only sees what is sent to it.

import { allChats, conversation, emptyChat, fork, isChatKey, matches, readChat, removeChat, showVersion, store, textOf, versions, writeChat } from "./chats.js";
import { element, highlighted, markdown, whenBetter } from "./markdown.js";
import { morph } from "./morph.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"];

store.failed = () => toast("This browser's storage is full or closed to this page: the conversation is not kept.");
const settings = store.read("nanochat.settings", {});
let models = [];
let chat = null;
let answering = null; // the AbortController of the answer that is coming

function keep() {
  if (!chat || !chat.messages.length) return;
  chat.changed = Date.now();
  writeChat(chat);
  listConversations();
}

function newChat() {
  stop();
  chat = emptyChat(settings.system || "");
  store.write("nanochat.current", chat.id);
  render();
  listConversations();
}

function openChat(id) {
  if (answering && chat.id === id) return;
  stop();
  const found = readChat(id);
  if (!found) return newChat();
  chat = found;
  for (const message of chat.messages) {
    // The page was closed while an answer came.
    if (!message.coming) continue;
    delete message.coming;
    message.stopped = true;
  }
  store.write("nanochat.current", id);
  render();
  listConversations();
}

// The list of conversations

const ICONS = {
  rename: "M4 20h4L19 9l-4-4L4 16v4M13 7l4 4",
  save: "M12 4v11m-5-5 5 5 5-5M5 20h14",
  delete: "M6 6l12 12M18 6 6 18",
};

function iconButton(name, label, action) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  const node = element("button", { type: "button", className: `icon ${name}`, "aria-label": label, title: label }, svg);
  node.addEventListener("click", action);
  return node;
}

function listConversations() {
  const words = $("search").value.trim();
  const items = allChats().filter((one) => matches(one, words)).map((one) => {
    const title = one.title || "Conversation";
    const open = element("button", { type: "button", className: "open", title }, title);
    open.addEventListener("click", () => {
      openChat(one.id);
      showSidebar(false);
      $("input").focus();
    });
    const item = element(
      "li",
      {},
      open,
      iconButton("rename", `Rename ${title}`, () => rename(one.id, item)),
      iconButton("save", `Export ${title}`, () => {
        download(`${fileName(title)}.json`, `${JSON.stringify({ messages: conversation(readChat(one.id) || one) }, null, 1)}\n`);
      }),
      iconButton("delete", `Delete ${title}`, () => {
        if (!confirm(`Delete "${title}"?`)) return;
        removeChat(one.id);
        if (chat.id === one.id) newChat();
        listConversations();
      }),
    );
    if (chat && one.id === chat.id) {
      item.dataset.current = "";
      open.setAttribute("aria-current", "true");
    }
    return item;
  });
  if (!items.length && words) items.push(element("li", { className: "none" }, "Nothing found"));
  $("chats").replaceChildren(...items);
}

function rename(id, item) {
  const one = chat.id === id ? chat : readChat(id);
  const field = element("input", { value: one.title, maxLength: 200, "aria-label": "Title" });
  const done = (kept) => {
    if (kept && field.value.trim() && field.value.trim() !== one.title) {
      Object.assign(one, { title: field.value.trim(), named: true });
      writeChat(one);
    }
    listConversations();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    field.onblur = null;
    done(event.key === "Enter");
  });
  field.onblur = () => done(true);
  item.replaceChildren(field);
  field.select();
}

const fileName = (title) => title.replace(/[^\p{L}\p{N} ._-]+/gu, "").trim().slice(0, 60) || "conversation";

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// What is shown

function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").hidden = true), 6000);
}

function say(text) {
  $("status").textContent = text;
}

async function copy(text, button) {
  const before = button.textContent;
  let copied;
  try {
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch {
    copied = copyOldWay(text); // browsers keep the clipboard from pages that come over plain HTTP
  }
  button.textContent = copied ? "Copied" : "Not copied";
  say(button.textContent);
  setTimeout(() => (button.textContent = before), 1500);
}

function copyOldWay(text) {
  const area = element("textarea", { value: text, className: "hidden" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

function body(message) {
  if (message.role === "user") return [message.content];
  const nodes = [];
  message.parts.forEach((part, i) => {
    if (part.type === "text") nodes.push(markdown(part.text));
    else if (part.type === "python") {
      const next = message.parts[i + 1];
      nodes.push(toolBlock(part.text, next && next.type === "python_output" ? next.text : null));
    }
  });
  return nodes;
}

function toolBlock(code, output) {
  const short = code.length > 60 || code.includes("\n") ? `${code.split("\n")[0].slice(0, 60)}…` : code;
  const result = output === null ? "" : ` → ${output.length > 40 ? `${output.slice(0, 40)}…` : output}`;
  return element(
    "details",
    { className: "tool" },
    element("summary", {}, `Tool: ${short}${result}`),
    element("h3", {}, "Call"),
    element("pre", {}, highlighted(code, "python")),
    element("h3", {}, "Output"),
    element("pre", {}, element("code", {}, output === null ? "none" : output)),
  );
}

function button(label, action) {
  return element("button", { type: "button", dataset: { action } }, label);
}

function messageNode(message, index) {
  const who = message.role === "user" ? "You" : message.model || "Assistant";
  const node = element("article", { className: message.role, "aria-label": who, dataset: { index } });
  node.append(element("h2", { className: "hidden" }, who));
  if (message.notice) node.append(element("p", { className: "notice" }, `Note: ${message.notice}.`));
  const content = element("div", { className: "body" }, ...body(message));
  node.append(content);
  if (message.coming && !textOf(message)) content.append(element("span", { className: "waiting", "aria-label": "waiting" }));
  if (message.error) node.append(element("p", { className: "error" }, message.error));
  if (message.coming) return node;
  if (index >= chat.messages.length - 2) node.classList.add("last");
  const actions = element("div", { className: "actions" });
  const [at, count] = versions(message);
  if (count > 1) {
    const before = button("‹", "before");
    const after = button("›", "after");
    before.setAttribute("aria-label", "Version before");
    after.setAttribute("aria-label", "Next version");
    before.disabled = at === 0;
    after.disabled = at === count - 1;
    actions.append(element("span", { className: "versions" }, before, `${at + 1}/${count}`, after));
  }
  actions.append(button("Copy", "copy"));
  if (message.role === "user") actions.append(button("Edit", "edit"));
  else {
    actions.append(button(message.error ? "Try again" : "Regenerate", "again"));
    actions.append(element("span", { className: "facts" }, facts(message)));
  }
  node.append(actions);
  return node;
}

function facts(message) {
  const found = models.length > 1 && message.model ? [message.model] : [];
  if (message.tokens) {
    found.push(`${message.tokens} tokens`);
    if (message.seconds > 0) found.push(`${Math.round(message.tokens / message.seconds)} tokens/s`);
  }
  if (message.finish === "length") found.push("cut off at the limit");
  if (message.stopped) found.push("stopped");
  return found.join(" · ");
}

function welcome() {
  const model = models.find((one) => one.id === $("model").value);
  const node = element("div", { className: "empty" }, element("p", {}, "Ask something to begin."));
  const examples = (model?.examples || []).map((text) => element("button", { type: "button", dataset: { example: text } }, text));
  if (examples.length) node.append(element("p", { className: "note" }, "This model was trained on questions like these:"), element("div", { className: "examples" }, ...examples));
  return node;
}

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
  showEndButton();
}

function showEndButton() {
  $("to-end").hidden = isAtEnd();
}

// Shows what there is, touching only what differs.
function refresh() {
  const fresh = chat.messages.length ? chat.messages.map(messageNode) : [welcome()];
  morph($("log"), element("div", {}, ...fresh));
  $("send").hidden = answering !== null;
  $("stop").hidden = answering === null;
  showEndButton();
}

function render() {
  refresh();
  toEnd();
}

// Only the answer that is growing, at most once a frame.
function renderLast() {
  if (renderLast.asked) return;
  renderLast.asked = true;
  requestAnimationFrame(() => {
    renderLast.asked = false;
    const last = chat.messages.length - 1;
    const old = $("log").children[last];
    if (!old || old.tagName !== "ARTICLE") return;
    const follow = isAtEnd();
    morph(old, messageNode(chat.messages[last], last));
    if (follow) toEnd();
    else showEndButton();
  });
}

// Talking to the server

function headers() {
  const found = { "Content-Type": "application/json" };
  if (settings.key) found.Authorization = `Bearer ${settings.key}`;
  return found;
}

async function explain(response) {
  let text = `The server answered ${response.status}.`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // not our server's words
  }
  if (response.status === 401) text += " (Settings, API key)";
  return text;
}

function requestBody(messages) {
  const sent = conversation({ ...chat, messages });
  const request = { model: $("model").value, messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (typeof settings[name] === "number") request[name] = settings[name];
  return request;
}

function grow(message, type, text) {
  const last = message.parts[message.parts.length - 1];
  if (last && last.type === type) last.text += text;
  else message.parts.push({ type, text });
}

async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

// The answer to the messages before `index`; what stands there becomes another version.
async function answer(index = chat.messages.length) {
  const controller = new AbortController();
  const mine = chat;
  const message = { role: "assistant", parts: [], model: $("model").value, coming: true };
  const body = requestBody(mine.messages.slice(0, index));
  if (index < mine.messages.length) fork(mine.messages, index, message);
  else mine.messages.push(message);
  answering = controller;
  render();
  say("Answering");
  let started = 0;
  let saved = Date.now();
  let done = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: controller.signal,
    });
    if (!response.ok) throw new Error(await explain(response));
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") {
        done = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.notice) message.notice = chunk.notice;
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.delta.part) grow(message, choice.delta.part.type, choice.delta.part.text);
      else if (choice.delta.content) grow(message, "text", choice.delta.content);
      if (choice.finish_reason) message.finish = choice.finish_reason;
      if (message.parts.length && !started) started = performance.now();
      message.seconds = started ? (performance.now() - started) / 1000 : 0;
      if (mine === chat) renderLast();
      if (Date.now() - saved > 1000) {
        keep(); // a reload loses at most a second
        saved = Date.now();
      }
    }
    if (!done) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (controller.signal.aborted) message.stopped = true;
    else message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  delete message.coming;
  if (answering === controller) answering = null;
  if (mine === chat) {
    keep();
    const follow = isAtEnd();
    refresh();
    if (follow) toEnd();
  } else if (readChat(mine.id)) { // not where it was deleted
    writeChat({ ...mine, changed: Date.now() });
  }
  say(message.error || (message.stopped ? "Stopped" : `Answer: ${textOf(message)}`));
}

function stop() {
  if (!answering) return;
  answering.abort();
  answering = null;
}

function ready() {
  if (answering) return false;
  if (models.length) return true;
  toast("There is no model to talk to yet.");
  loadModels();
  return false;
}

// Asks; at `index`, what was asked there before becomes another version.
function send(text, index = chat.messages.length) {
  const content = text.replace(/^[\r\n]+|[\r\n]+$/g, "");
  if (!content.trim() || !ready()) return false;
  if (index === 0 && !chat.named) chat.title = content.trim().split("\n")[0].slice(0, 60);
  const message = { role: "user", content };
  if (index < chat.messages.length) fork(chat.messages, index, message);
  else chat.messages.push(message);
  keep();
  answer();
  return true;
}

function edit(index, node) {
  const area = element("textarea", { value: chat.messages[index].content, rows: 3, "aria-label": "Edit message" });
  const form = element("form", { className: "edit" }, area);
  const cancel = element("button", { type: "button" }, "Cancel");
  cancel.addEventListener("click", refresh);
  form.append(element("div", { className: "row" }, cancel, element("button", { type: "submit", className: "primary" }, "Send again")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (send(area.value, index)) $("input").focus();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") refresh();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  node.replaceChildren(element("h2", { className: "hidden" }, "You"), form);
  area.focus();
}

function act(action, target) {
  if (action === "copy-code") return copy(target.closest(".code").querySelector("pre").textContent, target);
  const node = target.closest("article");
  const index = Number(node.dataset.index);
  const message = chat.messages[index];
  if (action === "copy") return copy(textOf(message), target);
  if (answering) return;
  if (action === "edit") edit(index, node);
  else if (action === "again") {
    if (ready()) answer(index);
  } else {
    showVersion(chat.messages, index, versions(message)[0] + (action === "after" ? 1 : -1));
    keep();
    refresh();
    $("log").children[index].querySelector(`[data-action=${action}]:enabled, .versions :enabled`)?.focus();
  }
}

async function loadModels() {
  const select = $("model");
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await explain(response));
    models = (await response.json()).data.filter((model) => model.chat);
    if (!models.length) throw new Error("This server offers no chat model.");
  } catch (error) {
    toast(error instanceof TypeError ? "The server cannot be reached." : error.message);
    return;
  }
  select.replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
  select.disabled = false;
  if (models.some((model) => model.id === settings.model)) select.value = settings.model;
  showDefaults();
  refresh();
}

function showDefaults() {
  const model = models.find((one) => one.id === $("model").value);
  if (!model) return;
  for (const [name, value] of Object.entries(model.defaults)) $(`set-${name}`).placeholder = value;
  $("set-top_p").placeholder = 1;
  $("set-min_p").placeholder = 0;
  $("set-max_tokens").max = model.context_length;
  const size = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toFixed(1)} M` : model.parameters;
  $("model").title = `${size} parameters, context ${model.context_length}`;
}

// Settings

function fillSettings() {
  for (const name of NUMBERS) $(`set-${name}`).value = settings[name] ?? "";
  $("set-system").value = chat.system;
  $("set-key").value = settings.key || "";
}

function readSettings() {
  for (const name of NUMBERS) {
    const field = $(`set-${name}`);
    if (field.value === "" || !field.validity.valid) delete settings[name];
    else settings[name] = Number(field.value);
  }
  settings.system = chat.system = $("set-system").value;
  const key = $("set-key").value;
  const changed = key !== (settings.key || "");
  settings.key = key;
  store.write("nanochat.settings", settings);
  keep();
  if (changed || !models.length) loadModels();
}

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function showSidebar(shown) {
  $("sidebar").classList.toggle("shown", shown);
  $("menu").setAttribute("aria-expanded", String(shown));
}

function fitInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// Wiring

$("log").addEventListener("click", (event) => {
  const target = event.target.closest("button");
  if (target?.dataset.action) act(target.dataset.action, target);
  else if (target?.dataset.example) send(target.dataset.example);
});
$("log").addEventListener("scroll", showEndButton, { passive: true });
$("to-end").addEventListener("click", () => {
  toEnd();
  $("input").focus();
});
$("search").addEventListener("input", listConversations);
$("export-all").addEventListener("click", () => {
  const lines = allChats().map((one) => JSON.stringify({ messages: conversation(one) }));
  download("conversations.jsonl", lines.map((line) => `${line}\n`).join(""));
});
whenBetter(() => {
  const follow = isAtEnd();
  refresh();
  if (follow) toEnd();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (send($("input").value)) {
    $("input").value = "";
    fitInput();
  }
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => {
  stop();
  $("input").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if ($("sidebar").classList.contains("shown")) {
    showSidebar(false);
    $("menu").focus();
  } else stop();
});
$("new-chat").addEventListener("click", () => {
  newChat();
  showSidebar(false);
  $("input").focus();
});
$("menu").addEventListener("click", () => {
  const shown = !$("sidebar").classList.contains("shown");
  showSidebar(shown);
  if (shown) $("new-chat").focus();
});
$("shade").addEventListener("click", () => showSidebar(false));
$("model").addEventListener("change", () => {
  settings.model = $("model").value;
  store.write("nanochat.settings", settings);
  showDefaults();
  if (!chat.messages.length) refresh();
});
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = settings.theme || (dark ? "dark" : "light");
  settings.theme = now === "dark" ? "light" : "dark";
  store.write("nanochat.settings", settings);
  applyTheme();
  say(`${settings.theme} colours`);
});
$("open-settings").addEventListener("click", () => {
  fillSettings();
  $("settings").showModal();
});
$("settings").addEventListener("close", readSettings);
$("reset-settings").addEventListener("click", () => {
  for (const name of NUMBERS) $(`set-${name}`).value = "";
  $("set-system").value = "";
});
$("clear-all").addEventListener("click", () => {
  if (!confirm("Delete all conversations in this browser?")) return;
  for (const one of allChats()) removeChat(one.id);
  newChat();
});
addEventListener("pagehide", () => {
  if (!answering) return;
  keep();
  stop(); // a page that is only put aside would go on reading
});
addEventListener("storage", (event) => {
  if (isChatKey(event.key)) listConversations();
});

applyTheme();
const current = store.read("nanochat.current", null);
if (current) openChat(current);
else newChat();
loadModels();
$("input").focus();
