// The expression: a preset with its intensity, seen on the chosen face before anything is made.

import { Problem, getJson, request } from "./api.js";
import { $, fileName, h, tellRange } from "./dom.js";
import { showError } from "./errors.js";

const CARD_INTENSITY = 0.8;
const WAIT_MS = 120; // for the slider to rest
const PREVIEW_PX = 720;
const CARD_PX = 192;
const STYLE_BYTES = 1 << 16;

/** `value` is the setting `expression` of a job, empty for none. `onPreview(url, what)` shows a face, or null the face as it is. */
export class ExpressionInput {
  constructor(onPreview) {
    this.onPreview = onPreview;
    this.presets = [];
    this.face = null;
    this.previews = false;
    this.urls = [];
    this.round = new AbortController();
    this.timer = 0;
    $("#intensity").addEventListener("input", () => this.changed());
    $("#auto").addEventListener("change", () => this.changed());
    $("#style-choose").addEventListener("click", () => $("#style-input").click());
    $("#style-input").addEventListener("change", (event) => this.takeStyle(event.target.files[0]));
    $("#style-remove").addEventListener("click", () => {
      this.dropStyle();
      $("#style-choose").focus();
    });
    this.style = null;
    this.changed();
  }

  get preset() {
    return $('input[name="preset"]:checked')?.value ?? "";
  }

  get value() {
    const parts = this.preset ? [`${this.preset}:${Number($("#intensity").value)}`] : [];
    if ($("#auto").checked) parts.push("auto");
    return parts.join(",");
  }

  /** Take the manner of another speaker: a JSON file. The service checks what it says. */
  async takeStyle(file) {
    $("#style-input").value = "";
    if (!file) return;
    this.dropStyle();
    try {
      if (file.size > STYLE_BYTES) throw new SyntaxError();
      const style = JSON.parse(await file.text());
      if (typeof style !== "object" || style === null || Array.isArray(style)) throw new SyntaxError();
      this.style = style;
    } catch {
      showError("expression", `${fileName(file.name)} is no style. Choose a file that beavervision style learn wrote.`, $("#style-choose"));
      return;
    }
    $("#style-about").textContent = fileName(file.name);
    $("#style-remove").hidden = false;
  }

  dropStyle() {
    showError("expression", null);
    this.style = null;
    $("#style-about").textContent = "What beavervision style learn writes.";
    $("#style-remove").hidden = true;
  }

  /** Ask what can be expressed; without that part of the API the whole section stays hidden. */
  async load() {
    let told;
    try {
      told = await getJson("expressions");
    } catch (error) {
      if (error instanceof Problem && error.status === 404) return;
      throw error;
    }
    this.presets = told.filter((one) => ["preset", "custom"].includes(one.kind) && one.name !== "neutral");
    this.previews = true;
    const none = { name: "", label: "As it is", summary: "the person's own face" };
    $("#presets").replaceChildren(...[none, ...this.presets].map((one) => this.card(one)));
    $("#expression").hidden = false;
    this.changed();
  }

  card({ name, label, summary }) {
    const radio = h("input", { type: "radio", name: "preset", value: name, checked: !name, onchange: () => this.changed() });
    const picture = h("img", { alt: "", "data-preset": name, hidden: true });
    const shown = label ?? name[0].toUpperCase() + name.slice(1);
    return h("label", { class: "preset", title: summary }, radio, h("span", {}, picture, h("b", {}, shown)));
  }

  /** The face that previews are of: a small picture as a Blob, or null. */
  async setFace(blob) {
    this.round.abort();
    this.round = new AbortController();
    this.face = blob;
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    for (const picture of document.querySelectorAll("#presets img")) picture.hidden = true;
    showError("expression", null);
    if (!blob || !this.previews) return;
    const { signal } = this.round;
    this.changed();
    try {
      for (const picture of document.querySelectorAll("#presets img")) {
        const name = picture.dataset.preset;
        picture.src = await this.preview(name ? `${name}:${CARD_INTENSITY}` : "neutral:0", "face", CARD_PX, signal);
        picture.hidden = false;
      }
    } catch (error) {
      if (!signal.aborted) this.failed(error);
    }
  }

  async preview(expression, view, side_px, signal) {
    const form = new FormData();
    form.append("expression", expression);
    form.append("face", $("#which").value);
    form.append("view", view);
    form.append("side_px", String(side_px));
    form.append("video", this.face, "face.jpg");
    const answer = await request("expressions/preview", { method: "POST", body: form, signal });
    const url = URL.createObjectURL(await answer.blob());
    this.urls.push(url);
    return url;
  }

  changed() {
    const { preset } = this;
    $("#intensity").disabled = !preset;
    tellRange("intensity", preset ? `${Math.round($("#intensity").value * 100)} %` : "");
    const found = this.presets.find((one) => one.name === preset);
    $("#expression-hint").textContent = found ? `${found.summary[0].toUpperCase()}${found.summary.slice(1)}.` : "";
    clearTimeout(this.timer);
    if (!this.previews || !this.face) return;
    if (!preset) {
      this.onPreview(null, "");
      return;
    }
    const { signal } = this.round;
    const intensity = Number($("#intensity").value);
    this.timer = setTimeout(async () => {
      try {
        const url = await this.preview(`${preset}:${intensity}`, "picture", PREVIEW_PX, signal);
        if (this.preset === preset && Number($("#intensity").value) === intensity) {
          this.onPreview(url, `Preview: ${preset}, ${Math.round(intensity * 100)} %`);
        }
      } catch (error) {
        if (!signal.aborted) this.failed(error);
      }
    }, WAIT_MS);
  }

  failed(error) {
    if (!(error instanceof Problem)) throw error;
    showError("expression", `There is no preview. ${error.message}`);
  }
}

/** Wait for a picture of a paused video near its beginning: before that, canvases get a black one. */
async function presented(video) {
  const shown = new Promise((resolve) => video.requestVideoFrameCallback(resolve));
  video.currentTime = Math.min(0.1, video.duration / 2 || 0);
  await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, 3000))]);
}

/** A small JPEG of what an element shows, for previews; null if it shows nothing. */
export async function smallPicture(element) {
  const width = element.videoWidth ?? element.naturalWidth;
  const height = element.videoHeight ?? element.naturalHeight;
  if (!width || !height) return null;
  if (element.requestVideoFrameCallback) await presented(element);
  const scale = Math.min(1, 720 / Math.max(width, height));
  const canvas = h("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(element, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}
