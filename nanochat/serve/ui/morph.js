// Makes the children of one node like those of another, and touches only what differs: a selection,
// an opened tool call or a scrolled block of code outlives the next piece of an answer.

export function morph(old, fresh) {
  const kept = [...old.childNodes];
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, i) => {
    const there = kept[i];
    if (!there) old.append(node);
    else if (there.isEqualNode(node)) return;
    else if (there.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) changeText(there, node.data);
    else if (there.nodeName === node.nodeName && !there.classList.contains("math")) {
      changeAttributes(there, node);
      morph(there, node);
    } else there.replaceWith(node);
  });
  for (const node of kept.slice(wanted.length)) node.remove();
}

function changeText(node, text) {
  const end = Math.min(node.length, text.length);
  let same = 0;
  while (same < end && node.data[same] === text[same]) same += 1;
  node.replaceData(same, node.length - same, text.slice(same)); // ranges before `same` stay
}

function changeAttributes(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}
