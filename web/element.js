/** An element with children; strings become text nodes, so that no name from a machine is ever read as HTML. */
export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

export function classed(name, made) {
  made.className = name;
  return made;
}

/** tip: said where the pointer rests on it. */
export function button(label, tip, press) {
  const made = element("button", label);
  made.type = "button";
  made.title = tip;
  made.onclick = press;
  return made;
}
