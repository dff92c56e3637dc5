// Small helpers: elements, storage that may be switched off, and numbers as people read them.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, name), attributes, children);

/** Storage of this tab ("session") or this device ("local"); without it values last as long as the page. */
function storage(kind) {
  const memory = new Map();
  const real = () => window[`${kind}Storage`];
  return {
    get(name) {
      try {
        return real().getItem(name);
      } catch {
        return memory.get(name) ?? null;
      }
    },
    set(name, value) {
      try {
        real().setItem(name, value);
      } catch {
        memory.set(name, value);
      }
    },
    remove(name) {
      memory.delete(name);
      try {
        real().removeItem(name);
      } catch {
        // nothing was stored
      }
    },
  };
}

export const session = storage("session");
export const local = storage("local");

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function clock(value) {
  const whole = Math.max(0, value);
  return `${Math.floor(whole / 60)}:${String(Math.floor(whole % 60)).padStart(2, "0")}`;
}

export function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1024))} kB` : `${(bytes / 1048576).toFixed(1)} MB`;
}

export const fileName = (name) => (name.length > 40 ? `${name.slice(0, 24)}…${name.slice(-14)}` : name);

/** Write the value of a range input beside its label, and tell it to screen readers. */
export function tellRange(name, text) {
  $(`#${name}-out`).textContent = text;
  $(`#${name}`).setAttribute("aria-valuetext", text || "none");
}

/** A name that nobody guesses, also where the page was not loaded over HTTPS. */
export const unique = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export function languageName(tag) {
  try {
    return new Intl.DisplayNames(["en"], { type: "language" }).of(tag) ?? tag;
  } catch {
    return tag;
  }
}
