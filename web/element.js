/** An element with children; strings become text nodes, so that no name from a machine is ever read as HTML. */
export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}
