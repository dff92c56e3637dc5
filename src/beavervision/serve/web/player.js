// The result, alone, beside its source, or over it with a slider between the two.

import { clock, h } from "./dom.js";

const MODES = [
  ["slider", "Slider"],
  ["both", "Side by side"],
  ["result", "Result"],
];
const DRIFT_S = 0.12;

/**
 * Where a source of `length_s` stands when the result shows second `time_s`: videos are played back and forth ("loop"),
 * or hold their last picture.
 */
export function sourceTime(time_s, length_s, fit) {
  if (!(length_s > 0)) return { time_s: 0, backwards: false };
  if (fit !== "loop") return { time_s: Math.min(time_s, length_s), backwards: false };
  const turn = time_s % (2 * length_s);
  return turn <= length_s ? { time_s: turn, backwards: false } : { time_s: 2 * length_s - turn, backwards: true };
}

export class Player {
  /** `source` is {kind, url, fit} or null where this browser does not have the source. */
  constructor(place, video, source, { onTime = () => {}, onLost = () => {} } = {}) {
    this.onTime = onTime;
    this.fit = source?.fit ?? "loop";
    this.video = h("video", { src: video, playsinline: true, preload: "auto", "aria-label": "The result" });
    this.source = null;
    if (source?.kind === "video") {
      this.source = h("video", { src: source.url, muted: true, playsinline: true, preload: "auto", "aria-label": "The source" });
      this.source.muted = true;
    } else if (source?.kind === "picture") this.source = h("img", { src: source.url, alt: "The source" });
    this.root = h("div", { class: "player" });
    place.replaceChildren(this.root);
    this.root.append(this.screen(), this.bar());
    this.turnTo(this.source ? "slider" : "result");
    this.source?.addEventListener("error", () => {
      this.modes.hidden = true;
      this.turnTo("result");
    });
    this.video.addEventListener("error", onLost);
    for (const name of ["play", "pause", "ended"]) this.video.addEventListener(name, () => this.changed());
    for (const name of ["timeupdate", "seeked", "loadedmetadata"]) this.video.addEventListener(name, () => this.tick());
  }

  screen() {
    const made = h("figure", { class: "side made" }, this.video, h("figcaption", {}, "Result"));
    const layers = h("div", { class: "layers" });
    if (this.source) {
      layers.append(h("figure", { class: "side source" }, this.source, h("figcaption", {}, "Source")));
      this.cut = h("input", { type: "range", class: "cut", min: 0, max: 100, value: 50, "aria-label": "Source left, result right" });
      this.cut.addEventListener("input", () => this.slide());
    }
    layers.append(made);
    if (this.cut) {
      layers.append(this.cut, h("div", { class: "edge", "aria-hidden": "true" }));
      this.slide();
    }
    return h("div", { class: "screen" }, layers);
  }

  bar() {
    this.toggle = h("button", { type: "button", onclick: () => this.playOrPause() }, "Play");
    this.seek = h("input", { type: "range", class: "seek", min: 0, max: 1, step: 0.01, value: 0, "aria-label": "Position" });
    this.seek.addEventListener("input", () => {
      this.video.currentTime = Number(this.seek.value);
    });
    this.time = h("span", { class: "time" }, "0:00");
    this.mute = h("button", { type: "button", class: "quiet", "aria-pressed": "false" }, "Mute");
    this.mute.addEventListener("click", () => {
      this.video.muted = !this.video.muted;
      this.mute.setAttribute("aria-pressed", String(this.video.muted));
    });
    const bar = h("div", { class: "controls" }, this.toggle, this.seek, this.time, this.mute);
    this.modes = h("div", { class: "tabs", role: "radiogroup", "aria-label": "Compare", hidden: !this.source });
    for (const [mode, name] of MODES) {
      const radio = h("input", { type: "radio", name: "compare", value: mode, onchange: () => this.turnTo(mode) });
      this.modes.append(h("label", {}, radio, h("span", {}, name)));
    }
    bar.append(this.modes);
    return bar;
  }

  turnTo(mode) {
    this.root.dataset.mode = mode;
    for (const radio of this.modes.querySelectorAll("input")) radio.checked = radio.value === mode;
  }

  slide() {
    const { value } = this.cut;
    this.cut.setAttribute("aria-valuetext", `${value} % source, ${100 - value} % result`);
    this.cut.parentElement?.style.setProperty("--cut", `${value}%`);
    this.cut.closest(".layers")?.style.setProperty("--cut", `${value}%`);
  }

  async playOrPause() {
    if (this.video.paused) await this.video.play().catch(() => {});
    else this.video.pause();
  }

  changed() {
    this.toggle.textContent = this.video.paused ? "Play" : "Pause";
    if (this.video.paused) this.tick();
    else this.run();
  }

  run() {
    this.tick();
    if (!this.video.paused && this.root.isConnected) requestAnimationFrame(() => this.run());
  }

  tick() {
    const { currentTime, duration } = this.video;
    if (Number.isFinite(duration)) this.seek.max = duration;
    this.seek.value = currentTime;
    this.seek.setAttribute("aria-valuetext", clock(currentTime));
    this.time.textContent = `${clock(currentTime)} / ${clock(duration || 0)}`;
    this.followSource(currentTime);
    this.onTime(currentTime);
  }

  followSource(now_s) {
    const { source } = this;
    if (!(source instanceof HTMLVideoElement) || source.readyState < 1 || source.seeking) return;
    const { time_s, backwards } = sourceTime(now_s, source.duration, this.fit);
    const playing = !this.video.paused && !backwards && time_s < source.duration;
    if (playing && source.paused) source.play().catch(() => {});
    if (!playing && !source.paused) source.pause();
    if (Math.abs(source.currentTime - time_s) > (playing ? DRIFT_S : 0.02)) source.currentTime = time_s;
  }

  seekTo(time_s) {
    this.video.currentTime = time_s;
  }

  close() {
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
    this.root.remove();
  }
}
