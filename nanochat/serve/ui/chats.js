// Conversations: kept in this browser, one key each, so that two tabs do not overwrite each other's.
//
// `messages` is what is shown and sent. Where a message was edited or an answer was asked for again,
// the message at the fork carries `forks`: {at, tails}, every version of the conversation from there
// on; the version that is shown is in `messages`, and its place in `tails`, number `at`, is null.

const PREFIX = "nanochat.chat.";

export const store = {
  failed: () => {},
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
      store.failed();
    }
  },
};

export const isChatKey = (key) => key === null || key.startsWith(PREFIX);
export const readChat = (id) => store.read(PREFIX + id, null);
export const writeChat = (chat) => store.write(PREFIX + chat.id, chat);
export const removeChat = (id) => localStorage.removeItem(PREFIX + id);

export function allChats() {
  const all = [];
  for (let i = 0; i < localStorage.length; i += 1) {
    const key = localStorage.key(i);
    if (!key.startsWith(PREFIX)) continue;
    const found = store.read(key, null);
    if (found && Array.isArray(found.messages)) all.push(found);
  }
  return all.sort((a, b) => b.changed - a.changed);
}

export function emptyChat(system) {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", messages: [], system, changed: 0 };
}

export const textOf = (message) =>
  message.role === "user"
    ? message.content
    : message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

export const matches = (chat, words) => {
  const text = [chat.title, ...chat.messages.map(textOf)].join("\n").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
};

// Versions

export function versions(message) {
  return message.forks ? [message.forks.at, message.forks.tails.length] : [0, 1];
}

// The conversation from `index` on becomes one version; what is put there now, another one.
export function fork(messages, index, message) {
  const forks = messages[index].forks || { at: 0, tails: [null] };
  forks.tails.push(null);
  shelve(messages, index, forks, forks.tails.length - 1);
  message.forks = forks;
  messages.push(message);
}

export function showVersion(messages, index, number) {
  const { forks } = messages[index];
  shelve(messages, index, forks, number);
  const tail = forks.tails[number];
  forks.tails[number] = null;
  tail[0].forks = forks;
  messages.push(...tail);
}

function shelve(messages, index, forks, next) {
  const tail = messages.splice(index);
  delete tail[0].forks;
  forks.tails[forks.at] = tail;
  forks.at = next;
}

// What the server is sent, and what `chat_cli`'s /load and `customjson` read.
export function conversation(chat) {
  const found = [];
  if (chat.system?.trim()) found.push({ role: "system", content: chat.system });
  for (const message of chat.messages) {
    if (message.role === "user") found.push({ role: "user", content: message.content });
    else {
      const parts = message.parts.filter((part) => part.text || part.type === "python_output");
      if (parts.some((part) => part.text && part.type !== "python_output")) found.push({ role: "assistant", content: parts });
    }
  }
  return found;
}
