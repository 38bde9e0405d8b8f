// The few lines that stand in for a framework.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text is always text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Sets a text only where it is another one: what has not changed is not read out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A line about what happened, or what went wrong. */
export function note(element, text, { problem = false } = {}) {
  say(element, text);
  element.classList.toggle("problem", problem);
}

/** Tells those who cannot see the page what changed on it. */
export const announce = (text) => say(byId("spoken"), text);

export function bytes(count) {
  if (count === null) return null;
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export const counted = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
