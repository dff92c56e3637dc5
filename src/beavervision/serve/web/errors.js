// Errors: beside the field that they are about, and in one place for all others.

import { $ } from "./dom.js";

const FIELDS = { face: "#face-choose", text: "#text", audio: "#audio-choose", consent: "#consent", more: "#fit", expression: "#intensity" };

/** Say `message` beside a field (null: nothing is wrong with it), and move the focus to `focus` if that is given. */
export function showError(field, message, focus = null) {
  const place = $(`#${field}-error`);
  place.textContent = message ?? "";
  place.hidden = !message;
  const input = $(FIELDS[field]);
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  if (message && focus) focus.focus();
}

export const clearErrors = () => Object.keys(FIELDS).forEach((field) => showError(field, null));

/** The field that a problem of the service is about, if it is one of the form's. */
export function fieldOf(problem, usesAudio) {
  const { code, message } = problem;
  if (["no_face", "no_avatar", "avatar_not_ready", "avatars"].includes(code)) return "face";
  if (code === "no_audio") return "audio";
  if (code === "consent") return "consent";
  if (code === "text") return "text";
  if (code === "media") return message.startsWith("The audio") ? "audio" : "face";
  if (code === "too_large") return usesAudio ? null : "face";
  if (code === "model" || code === "licence") return "more";
  return null;
}

const TITLES = {
  no_face: "No face was found",
  no_audio: "There is no sound",
  media: "The file cannot be used",
  text: "The text cannot be spoken",
  too_large: "Too large",
  consent: "Your confirmation is missing",
  unreachable: "The service does not answer",
  queue_full: "The service is busy",
  busy: "The service is busy",
  draining: "The service is being stopped",
  storage: "The service is short of space",
  no_key: "An API key is needed",
  no_job: "There is no such job",
  gone: "The video has expired",
  time_limit: "It took too long",
  cancelled: "Cancelled",
};

export const titleOf = (code) => TITLES[code] ?? "That did not work";
