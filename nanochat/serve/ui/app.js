// The chat page: conversations live in this browser, the server only sees what is sent to it.

import { element, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"];
const PREFIX = "nanochat.chat.";

// What is kept

const store = {
  read(key, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(key)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch {
      toast("This browser's storage is full or closed to this page: the conversation is not kept.");
    }
  },
};

const settings = store.read("nanochat.settings", {});
let models = [];
let chat = null;
let answering = null; // the AbortController of the answer that is coming

// A conversation has its own key, so that two tabs do not overwrite each other's.
function conversations() {
  const all = [];
  for (let i = 0; i < localStorage.length; i += 1) {
    const key = localStorage.key(i);
    if (!key.startsWith(PREFIX)) continue;
    const found = store.read(key, null);
    if (found && Array.isArray(found.messages)) all.push(found);
  }
  return all.sort((a, b) => b.changed - a.changed);
}

function keep() {
  if (!chat || !chat.messages.length) return;
  chat.changed = Date.now();
  store.write(PREFIX + chat.id, chat);
  listConversations();
}

function newChat() {
  stop();
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  chat = { id, title: "", messages: [], system: settings.system || "", changed: 0 };
  store.write("nanochat.current", id);
  render();
  listConversations();
}

function openChat(id) {
  if (answering && chat.id === id) return;
  stop();
  const found = store.read(PREFIX + id, null);
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

function listConversations() {
  const items = conversations().map((one) => {
    const title = one.title || "Conversation";
    const open = element("button", { type: "button", className: "open", title }, title);
    open.addEventListener("click", () => {
      openChat(one.id);
      showSidebar(false);
      $("input").focus();
    });
    const remove = element("button", { type: "button", className: "delete", "aria-label": `Delete ${title}` }, "✕");
    remove.addEventListener("click", () => {
      if (!confirm(`Delete "${title}"?`)) return;
      localStorage.removeItem(PREFIX + one.id);
      if (chat.id === one.id) newChat();
      listConversations();
    });
    const item = element("li", {}, open, remove);
    if (chat && one.id === chat.id) {
      item.dataset.current = "";
      open.setAttribute("aria-current", "true");
    }
    return item;
  });
  $("chats").replaceChildren(...items);
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

const textOf = (message) =>
  message.role === "user"
    ? message.content
    : message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

function body(message) {
  if (message.role === "user") return [message.content];
  const nodes = [];
  message.parts.forEach((part, i) => {
    if (part.type === "text") nodes.push(markdown(part.text, copy));
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
    element("pre", {}, element("code", {}, code)),
    element("h3", {}, "Output"),
    element("pre", {}, element("code", {}, output === null ? "none" : output)),
  );
}

function button(label, action) {
  const node = element("button", { type: "button" }, label);
  node.addEventListener("click", action);
  return node;
}

function messageNode(message, index) {
  const who = message.role === "user" ? "You" : message.model || "Assistant";
  const node = element("article", { className: message.role, "aria-label": who }, element("h2", {}, who));
  if (message.notice) node.append(element("p", { className: "notice" }, `Note: ${message.notice}.`));
  const content = element("div", { className: "body" }, ...body(message));
  node.append(content);
  if (message.coming && !textOf(message)) content.append(element("span", { className: "waiting", "aria-label": "waiting" }));
  if (message.error) node.append(element("p", { className: "error" }, message.error));
  if (message.coming) return node;
  const actions = element("div", { className: "actions" });
  const copier = button("Copy", () => copy(textOf(message), copier));
  actions.append(copier);
  if (message.role === "user") actions.append(button("Edit", () => edit(index, node)));
  else {
    actions.append(button(message.error ? "Try again" : "Regenerate", () => regenerate(index)));
    actions.append(element("span", { className: "facts" }, facts(message)));
  }
  node.append(actions);
  return node;
}

function facts(message) {
  const found = [];
  if (message.tokens) {
    found.push(`${message.tokens} tokens`);
    if (message.seconds > 0) found.push(`${Math.round(message.tokens / message.seconds)} tokens/s`);
  }
  if (message.finish === "length") found.push("cut off at the limit");
  if (message.stopped) found.push("stopped");
  return found.join(" · ");
}

function render() {
  const log = $("log");
  if (!chat.messages.length) log.replaceChildren(element("p", { className: "empty" }, "Ask something to begin."));
  else log.replaceChildren(...chat.messages.map(messageNode));
  log.scrollTop = log.scrollHeight;
  $("send").hidden = answering !== null;
  $("stop").hidden = answering === null;
}

// Replaces only the answer that is growing, at most once a frame.
function renderLast() {
  if (renderLast.asked) return;
  renderLast.asked = true;
  requestAnimationFrame(() => {
    renderLast.asked = false;
    const log = $("log");
    const last = chat.messages.length - 1;
    const old = log.children[last];
    if (!old) return;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    const fresh = messageNode(chat.messages[last], last);
    fresh.querySelectorAll("details").forEach((details, i) => (details.open = open[i] ?? false));
    old.replaceWith(fresh);
    if (atEnd) log.scrollTop = log.scrollHeight;
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
  const sent = [];
  if (chat.system.trim()) sent.push({ role: "system", content: chat.system });
  for (const message of messages) {
    if (message.role === "user") sent.push({ role: "user", content: message.content });
    else {
      const parts = message.parts.filter((part) => part.text || part.type === "python_output");
      if (parts.some((part) => part.text && part.type !== "python_output")) sent.push({ role: "assistant", content: parts });
    }
  }
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

async function answer() {
  const controller = new AbortController();
  const mine = chat;
  const message = { role: "assistant", parts: [], model: $("model").value, coming: true };
  const body = requestBody(mine.messages);
  mine.messages.push(message);
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
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const at = log.scrollTop;
    render();
    if (!atEnd) log.scrollTop = at;
  } else if (store.read(PREFIX + mine.id, null)) { // not where it was deleted
    store.write(PREFIX + mine.id, { ...mine, changed: Date.now() });
  }
  say(message.error || (message.stopped ? "Stopped" : `Answer: ${textOf(message)}`));
}

function stop() {
  if (!answering) return;
  answering.abort();
  answering = null;
}

function send(text) {
  if (!text.trim() || answering) return false;
  if (!models.length) {
    toast("There is no model to talk to yet.");
    loadModels();
    return false;
  }
  if (!chat.title) chat.title = text.trim().split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", content: text });
  keep();
  answer();
  return true;
}

function regenerate(index) {
  if (answering) return;
  chat.messages.length = index;
  answer();
}

function edit(index, node) {
  if (answering) return;
  const area = element("textarea", { value: chat.messages[index].content, rows: 3, "aria-label": "Edit message" });
  const form = element("form", { className: "edit" }, area);
  const again = element("button", { type: "submit", className: "primary" }, "Send again");
  form.append(element("div", { className: "row" }, button("Cancel", render), again));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!area.value.trim() || answering) return;
    chat.messages.length = index;
    if (index === 0) chat.title = "";
    send(area.value);
    $("input").focus();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") render();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  node.replaceChildren(element("h2", {}, "You"), form);
  area.focus();
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
  for (const one of conversations()) localStorage.removeItem(PREFIX + one.id);
  newChat();
});
addEventListener("pagehide", () => {
  if (!answering) return;
  keep();
  stop(); // a page that is only put aside would go on reading
});
addEventListener("storage", (event) => {
  if (event.key === null || event.key.startsWith(PREFIX)) listConversations();
});

applyTheme();
const current = store.read("nanochat.current", null);
if (current) openChat(current);
else newChat();
loadModels();
$("input").focus();
