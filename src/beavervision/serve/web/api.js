// The API as the page uses it: keys, problems, uploads with progress, and a job's events that survive a broken line.

import { $, local, session } from "./dom.js";

const BASE = "/api/v1";
const SILENCE_MS = 40_000; // the service sends something every 15 s
const PAUSES_S = [1, 2, 4, 8, 15];

/** What went wrong, told by the service (RFC 9457) or found here. `detail` says what to do. */
export class Problem extends Error {
  constructor({ status = 0, code = "error", detail = "Something unexpected happened. Try again.", job = null }) {
    super(detail);
    Object.assign(this, { status, code, detail, job });
  }
}

const unreachable = () =>
  new Problem({
    code: "unreachable",
    detail: "The service does not answer. Check that it is running and that you are connected, then try again.",
  });

function problemOf(status, text) {
  try {
    const told = JSON.parse(text);
    if (told.detail) return new Problem({ ...told, status });
  } catch {
    // no problem document: a proxy answered
  }
  return new Problem({ status, detail: `The service answered with status ${status}. Try again in a moment.` });
}

// The key -------------------------------------------------------------------------------------------------------------

let key = session.get("key") ?? local.get("key") ?? "";
let asking = null;

/** Ask the user for an API key, once for all that wait. Gives false if they would rather not. */
export function askForKey() {
  $("#key-button").hidden = false;
  asking ??= new Promise((resolve) => {
    const dialog = $("#key-dialog");
    $("#key-refused").hidden = !key;
    $("#key-forget").hidden = !key;
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        if (dialog.returnValue === "forget") forget();
        const given = $("#key").value.trim();
        if (dialog.returnValue === "use" && given) {
          forget();
          key = given;
          ($("#key-keep").checked ? local : session).set("key", key);
          $("#key").value = "";
          resolve(true);
        } else resolve(false);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

function forget() {
  key = "";
  session.remove("key");
  local.remove("key");
}

export const hasKey = () => key !== "";

const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

// Requests ------------------------------------------------------------------------------------------------------------

/** A response with a good status; asks for a key where one is needed. */
export async function request(path, { headers = {}, ...options } = {}) {
  const address = path.startsWith("/") ? path : `${BASE}/${path}`;
  for (;;) {
    const used = key;
    let response;
    try {
      response = await fetch(address, { ...options, headers: { ...headers, ...authorization() }, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw unreachable();
    }
    if (response.ok) return response;
    const problem = problemOf(response.status, await response.text().catch(() => ""));
    if (problem.status === 401 && (used !== key || (await askForKey()))) continue;
    throw problem;
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();

export const sendJson = (path, body, options = {}) =>
  request(path, {
    ...options,
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...options.headers },
  });

/** Send a form; `onSent` is told the share that has left. Gives the answer's JSON. */
export async function upload(path, form, { headers = {}, onSent = () => {}, signal } = {}) {
  for (;;) {
    const used = key;
    const { status, text } = await new Promise((resolve, reject) => {
      const sending = new XMLHttpRequest();
      sending.open("POST", `${BASE}/${path}`);
      for (const [name, value] of Object.entries({ ...headers, ...authorization() })) {
        sending.setRequestHeader(name, value);
      }
      sending.upload.onprogress = (event) => event.lengthComputable && onSent(event.loaded / event.total);
      sending.onload = () => resolve({ status: sending.status, text: sending.responseText });
      sending.onerror = () => reject(unreachable());
      sending.onabort = () => reject(new DOMException("stopped", "AbortError"));
      signal?.addEventListener("abort", () => sending.abort(), { once: true });
      sending.send(form);
    });
    if (status < 300) return JSON.parse(text);
    const problem = problemOf(status, text);
    if (problem.status === 401 && (used !== key || (await askForKey()))) continue;
    throw problem;
  }
}

// A job's events ------------------------------------------------------------------------------------------------------

/** The data of server-sent events. EventSource would do, but cannot send a key. */
async function* told(path, signal) {
  const quiet = new AbortController();
  const either = AbortSignal.any([signal, quiet.signal]);
  let timer = setTimeout(() => quiet.abort(), SILENCE_MS);
  try {
    const response = await request(path, { signal: either, headers: { Accept: "text/event-stream" } });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => quiet.abort(), SILENCE_MS);
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

export const ended = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);

/**
 * Follow a job to its end. `onJob` is told each change; `onGone(seconds, now)` that the line is broken and is tried again
 * after so many seconds, or at once when `now` is called; `onBack` that it holds again.
 */
export async function follow(id, { onJob, onGone, onBack, signal }) {
  let failures = 0;
  for (;;) {
    try {
      for await (const job of told(`jobs/${id}/events`, signal)) {
        if (failures) onBack();
        failures = 0;
        onJob(job);
        if (ended(job)) return;
      }
    } catch (error) {
      if (signal.aborted) throw error;
      if (error instanceof Problem && error.status >= 400 && error.status < 500) throw error;
    }
    signal.throwIfAborted();
    const pause_s = PAUSES_S[Math.min(failures, PAUSES_S.length - 1)];
    failures += 1;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, pause_s * 1000);
      const now = () => {
        clearTimeout(timer);
        resolve();
      };
      signal.addEventListener("abort", now, { once: true });
      onGone(pause_s, now);
    });
  }
}

/** The address of a job's video on this page's own origin, whatever name the service calls itself. */
export function videoOf(job) {
  const { pathname, search } = new URL(job.video_url, location.href);
  return pathname + search;
}
