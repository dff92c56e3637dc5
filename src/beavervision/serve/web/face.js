// The face: a file, a picture from the webcam, the sample portrait, or one that the service has stored.

import { Problem, getJson, request, upload } from "./api.js";
import { $, $$, fileName, h, seconds, size } from "./dom.js";
import { showError } from "./errors.js";

const KINDS = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|m4v|mov|mkv|webm|avi|mpe?g|ts|3gp)$/i;

const LOOK_MS = 1000; // between two looks at a face that is being stored

/**
 * The chosen face. `value` is null, {file} or {avatar}; `onChange` is called with a look at it: what kind it is, where it can be
 * seen, and the Blob to compare results with.
 */
export class FaceInput {
  constructor(limits, onChange) {
    this.value = null;
    this.limits = limits;
    this.onChange = onChange;
    this.url = null;
    this.stream = null;
    this.avatars = [];
    $("#face-choose").addEventListener("click", () => $("#face-input").click());
    $("#face-input").addEventListener("change", (event) => this.take(event.target.files[0]));
    $("#face-sample").addEventListener("click", () => this.sample());
    $("#face-remove").addEventListener("click", () => {
      this.clear();
      $("#face-choose").focus();
    });
    $("#camera-start").addEventListener("click", () => this.startCamera());
    $("#camera-stop").addEventListener("click", () => this.stopCamera());
    $("#camera-shot").addEventListener("click", () => this.shoot());
    $("#avatar").addEventListener("change", () => this.takeAvatar());
    $("#avatar-store").addEventListener("click", () => this.storeAvatar());
    $("#avatar-name").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // it would make a video
      this.storeAvatar();
    });
    $("#avatar-delete").addEventListener("click", () => this.deleteAvatar());
    for (const radio of $$('input[name="face-from"]')) radio.addEventListener("change", () => this.turnTo(radio.value));
    droppable($("#face-drop"), (file) => this.take(file));
    document.addEventListener("paste", (event) => {
      const file = event.clipboardData?.files[0];
      if (file && KINDS.test(file.name)) {
        this.turnTo("file");
        this.take(file);
      }
    });
  }

  turnTo(from) {
    $(`input[name="face-from"][value="${from}"]`).checked = true;
    for (const name of ["file", "camera", "avatar"]) $(`#face-${name}`).hidden = name !== from;
    if (from !== "camera") this.stopCamera();
    showError("face", null);
    if (from === "avatar") this.takeAvatar();
    else if (this.value?.avatar) this.clear();
  }

  /** Take a file, or say why it cannot be taken. */
  take(file) {
    $("#face-input").value = "";
    if (!file) return;
    const wrong = unusable(file, this.limits, /^(image|video)\//, KINDS, "a picture or video");
    if (wrong) {
      showError("face", wrong, $("#face-choose"));
      return;
    }
    this.clear();
    this.value = { file };
    this.url = URL.createObjectURL(file);
    const moving = file.type.startsWith("video/") || !(file.type || /\.(jpe?g|png|webp|gif|bmp|avif)$/i.test(file.name));
    this.show(file, moving ? "video" : "picture");
    $("#face-remove").hidden = false;
    $("#face-sample").hidden = $("#face-hint").hidden = true;
    $("#face-choose").textContent = "Choose another";
    $("#avatar-save").hidden = !this.canStore;
    $("#avatar-name").value = file.name.replace(/\.[^.]*$/, "").slice(0, 60);
    this.onChange({ kind: moving ? "video" : "picture", url: this.url, source: file });
  }

  show(file, kind) {
    const about = (more) => {
      $("#face-about").textContent = [fileName(file.name), size(file.size), ...more].join(" · ");
    };
    about([]);
    const thumb = $("#face-thumb");
    const shown =
      kind === "video"
        ? h("video", { src: this.url, muted: true, playsinline: true, preload: "metadata", "aria-hidden": "true", tabindex: "-1" })
        : h("img", { src: this.url, alt: "" });
    shown.addEventListener(kind === "video" ? "loadedmetadata" : "load", () => {
      const measures = [`${shown.videoWidth ?? shown.naturalWidth} × ${shown.videoHeight ?? shown.naturalHeight}`];
      if (shown.duration > this.limits.media_s) {
        const allowed = seconds(this.limits.media_s);
        showError("face", `This video is ${seconds(shown.duration)} long; ${allowed} are allowed. Cut it first.`);
      }
      if (Number.isFinite(shown.duration)) measures.push(seconds(shown.duration));
      about(measures);
      if (kind === "video") shown.currentTime = Math.min(0.1, shown.duration / 2 || 0);
    });
    shown.addEventListener("error", () => about(["this browser cannot show it, the service may"]));
    thumb.replaceChildren(shown);
    thumb.hidden = false;
  }

  clear() {
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.value = null;
    showError("face", null);
    $("#face-thumb").hidden = true;
    $("#face-thumb").replaceChildren();
    $("#face-about").textContent = "Drop a picture or video here";
    $("#face-remove").hidden = true;
    $("#face-sample").hidden = $("#face-hint").hidden = false;
    $("#face-choose").textContent = "Choose a file";
    $("#avatar-save").hidden = true;
    this.onChange(null);
  }

  async sample() {
    try {
      const response = await fetch(new URL("sample.png", import.meta.url));
      this.take(new File([await response.blob()], "sample portrait.png", { type: "image/png" }));
    } catch {
      showError("face", "The sample portrait cannot be loaded: the service does not answer. Try again.");
    }
  }

  // Webcam --------------------------------------------------------------------------------------

  async startCamera() {
    showError("face", null);
    try {
      if (!navigator.mediaDevices) throw new DOMException("", "SecurityError");
      this.stream = await navigator.mediaDevices.getUserMedia({
        video: { width: { ideal: 1280 }, height: { ideal: 720 }, facingMode: "user" },
      });
    } catch (error) {
      showError("face", cameraTrouble(error.name), $("#camera-start"));
      return;
    }
    const view = $("#camera-view");
    view.srcObject = this.stream;
    view.hidden = false;
    await view.play().catch(() => {});
    $("#camera-start").hidden = true;
    $("#camera-shot").hidden = $("#camera-stop").hidden = false;
    $("#camera-shot").focus();
  }

  stopCamera() {
    if (!this.stream) return;
    for (const track of this.stream.getTracks()) track.stop();
    this.stream = null;
    const view = $("#camera-view");
    view.srcObject = null;
    view.hidden = true;
    $("#camera-start").hidden = false;
    $("#camera-shot").hidden = $("#camera-stop").hidden = true;
  }

  async shoot() {
    const view = $("#camera-view");
    if (!view.videoWidth) {
      showError("face", "The camera gives no picture yet. Wait a moment and try again.");
      return;
    }
    const canvas = h("canvas", { width: view.videoWidth, height: view.videoHeight });
    canvas.getContext("2d").drawImage(view, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
    this.turnTo("file");
    this.take(new File([blob], "webcam.jpg", { type: "image/jpeg" }));
    $("#face-remove").focus();
  }

  // Stored faces --------------------------------------------------------------------------------

  /** Ask which faces the service has stored; without that part of the API the choice stays hidden. */
  async loadAvatars(chosen = null) {
    let answer;
    try {
      answer = await getJson("avatars");
    } catch (error) {
      if (error instanceof Problem && error.status === 404) return;
      throw error;
    }
    this.canStore = true;
    this.avatars = answer.filter((one) => one.state === "ready");
    $("#avatar-tab").hidden = !this.avatars.length;
    $("#avatar-save").hidden = !this.value?.file;
    const named = this.avatars.map((one) => h("option", { value: one.id }, one.name));
    $("#avatar").replaceChildren(...named);
    if (chosen) {
      $("#avatar").value = chosen;
      this.turnTo("avatar");
    } else if ($("#avatar-tab").hidden && this.value?.avatar) this.turnTo("file");
  }

  takeAvatar() {
    const id = $("#avatar").value;
    this.clear();
    const found = this.avatars.find((one) => one.id === id);
    $("#avatar-delete").hidden = !found;
    if (!found) return;
    this.value = { avatar: id };
    this.showAvatar(found);
  }

  async showAvatar(avatar) {
    try {
      const picture = await (await request(avatar.links.picture)).blob();
      if (this.value?.avatar !== avatar.id) return;
      this.url = URL.createObjectURL(picture);
      this.onChange({ kind: "picture", url: this.url, source: avatar.kind === "still" ? picture : null });
    } catch {
      this.onChange({ kind: "none", url: null });
    }
  }

  async storeAvatar() {
    const { file } = this.value ?? {};
    if (!file) return;
    if (this.limits.consent && !$("#consent").checked) {
      const wanted = "To store a face confirm below that you have the right to use it.";
      showError("face", wanted, $("#consent"));
      return;
    }
    const form = new FormData();
    form.append("name", $("#avatar-name").value.trim() || "face");
    form.append("face", $("#which").value);
    form.append("consent", String($("#consent").checked));
    form.append("video", file, "face");
    $("#avatar-store").disabled = true;
    try {
      let made = await upload("avatars", form);
      while (made.state === "preparing") {
        await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
        made = await getJson(`avatars/${made.id}`);
      }
      if (made.error) throw new Problem({ code: made.error.code, detail: made.error.message });
      await this.loadAvatars(made.id);
      $("#avatar").focus();
    } catch (error) {
      showError("face", error.message, $("#avatar-store"));
    } finally {
      $("#avatar-store").disabled = false;
    }
  }

  async deleteAvatar() {
    const { avatar } = this.value ?? {};
    if (!avatar) return;
    try {
      await request(`avatars/${avatar}`, { method: "DELETE" });
      this.turnTo("file");
      await this.loadAvatars();
      $("#face-choose").focus();
    } catch (error) {
      showError("face", error.message);
    }
  }
}

function cameraTrouble(name) {
  if (name === "NotAllowedError")
    return "The camera was refused. Allow it for this page in the browser's address bar and start it again, or choose a file.";
  if (name === "NotFoundError" || name === "OverconstrainedError")
    return "There is no camera. Connect one and start it again, or choose a file.";
  if (name === "SecurityError")
    return "Browsers give the camera to secure pages only. Open this page over HTTPS or as localhost, or choose a file.";
  return "The camera cannot be used; another program may have it. Close that program and start it again, or choose a file.";
}

/** Why a file cannot be sent; null if it can. */
export function unusable(file, limits, type, name, what) {
  if (!(type.test(file.type) || (!file.type && name.test(file.name))))
    return `${fileName(file.name)} is not ${what}. Choose another file.`;
  if (!file.size) return `${fileName(file.name)} is empty. Choose another file.`;
  if (file.size > limits.upload_mb * 1048576)
    return `${fileName(file.name)} has ${size(file.size)}; ${limits.upload_mb} MB are allowed. Cut or compress it first.`;
  return null;
}

export function droppable(area, take) {
  for (const name of ["dragenter", "dragover"]) {
    area.addEventListener(name, (event) => {
      event.preventDefault();
      area.classList.add("over");
    });
  }
  area.addEventListener("dragleave", (event) => {
    if (!area.contains(event.relatedTarget)) area.classList.remove("over");
  });
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}
