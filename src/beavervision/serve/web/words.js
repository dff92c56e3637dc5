// The words: a text with a voice, or a recording.

import { Problem, getJson, sendJson } from "./api.js";
import { $, $$, fileName, h, languageName, size, tellRange } from "./dom.js";
import { showError } from "./errors.js";
import { droppable, unusable } from "./face.js";

const SOUNDS = /\.(wav|mp3|m4a|aac|ogg|oga|opus|flac|mp4|mov|mkv|webm)$/i;
const HEARD_CHARS = 400; // of a long text are enough to know a voice

/** What is to be said: `value` is {text, voice, language, speed, pitch} or {audio}. */
export class WordsInput {
  constructor(limits, onVoice) {
    this.limits = limits;
    this.voices = [];
    this.audio = null;
    this.sound = null;
    for (const radio of $$('input[name="words-from"]')) radio.addEventListener("change", () => this.turn());
    $("#text").addEventListener("input", () => this.count());
    $("#language").addEventListener("change", () => this.listVoices());
    $("#voice").addEventListener("change", () => this.about());
    for (const name of ["speed", "pitch"]) $(`#${name}`).addEventListener("input", () => this.tellRanges());
    $("#hear").addEventListener("click", () => (this.sound ? this.hush() : this.hear()));
    $("#audio-choose").addEventListener("click", () => $("#audio-input").click());
    $("#audio-input").addEventListener("change", (event) => this.take(event.target.files[0]));
    $("#audio-remove").addEventListener("click", () => {
      this.drop();
      $("#audio-choose").focus();
    });
    droppable($("#audio-drop"), (file) => this.take(file));
    this.onVoice = onVoice;
    this.count();
    this.tellRanges();
  }

  get usesAudio() {
    return $('input[name="words-from"]:checked').value === "audio";
  }

  turn() {
    $("#words-text").hidden = this.usesAudio;
    $("#words-audio").hidden = !this.usesAudio;
    this.hush();
  }

  get settings() {
    const chosen = { language: $("#language").value || undefined, voice: $("#voice").value || undefined };
    return { ...chosen, speed: Number($("#speed").value), pitch: Number($("#pitch").value) };
  }

  count() {
    const { length } = [...$("#text").value];
    $("#text-count").textContent = `${length} of ${this.limits.text_chars} characters`;
    showError(
      "text",
      length > this.limits.text_chars ? `The text has ${length} characters. Shorten it, or make several videos.` : null,
    );
  }

  tellRanges() {
    for (const name of ["speed", "pitch"]) tellRange(name, `${Number($(`#${name}`).value).toFixed(2)} ×`);
  }

  async loadVoices() {
    this.voices = await getJson("voices");
    const usable = (tag) => this.voices.some((voice) => voice.language === tag && !voice.unavailable);
    const tags = [...new Set(this.voices.map((voice) => voice.language))];
    const named = tags
      .map((tag) => ({ tag, name: languageName(tag), here: usable(tag) }))
      .sort((a, b) => b.here - a.here || a.name.localeCompare(b.name));
    const options = named.map(({ tag, name, here }) =>
      h("option", { value: tag, disabled: !here }, here ? name : `${name} (not installed)`),
    );
    $("#language").replaceChildren(...options);
    const wished = [...navigator.languages.map((tag) => tag.toLowerCase()), "en-us", "en"];
    const first = wished.find(usable) ?? named.find((one) => one.here)?.tag;
    if (first) $("#language").value = first;
    this.listVoices();
  }

  listVoices() {
    const language = $("#language").value;
    const own = this.voices.filter((voice) => voice.language === language);
    const options = own.map((voice) =>
      h(
        "option",
        { value: voice.name, disabled: Boolean(voice.unavailable) },
        `${voice.name}${voice.gender ? `, ${voice.gender}` : ""}${voice.unavailable ? " (not installed)" : ""}`,
      ),
    );
    $("#voice").replaceChildren(...options);
    const first = own.find((voice) => !voice.unavailable);
    if (first) $("#voice").value = first.name;
    this.about();
  }

  about() {
    const voice = this.voices.find((one) => one.name === $("#voice").value);
    $("#voice-hint").textContent = voice ? [voice.description, voice.licence].filter(Boolean).join(" · ") : "";
    this.hush();
  }

  // Hearing the voice ---------------------------------------------------------------------------

  async hear() {
    const whole = $("#text").value.trim() || "This is how I sound.";
    const text = opening(whole);
    $("#hear").disabled = true;
    $("#hear-note").textContent = "Speaking…";
    showError("text", null);
    try {
      const spoken = await (await sendJson("speech", { ...this.settings, text })).json();
      const bytes = Uint8Array.from(atob(spoken.audio_base64), (letter) => letter.charCodeAt(0));
      this.play(new Blob([bytes], { type: "audio/wav" }));
      const notes = [text.length < whole.length ? "The beginning of your text." : ""];
      if (spoken.left_out) notes.push(`The voice cannot say ${spoken.left_out} and leaves it out.`);
      $("#hear-note").textContent = notes.filter(Boolean).join(" ");
    } catch (error) {
      $("#hear-note").textContent = "";
      if (!(error instanceof Problem)) throw error;
      showError("text", error.message);
    } finally {
      $("#hear").disabled = false;
    }
  }

  play(blob) {
    const url = URL.createObjectURL(blob);
    const sound = new Audio(url);
    this.sound = sound;
    $("#hear").textContent = "Stop";
    const over = () => {
      URL.revokeObjectURL(url);
      if (this.sound === sound) this.hush();
    };
    sound.addEventListener("ended", over);
    sound.addEventListener("error", over);
    sound.play().catch(over);
  }

  hush() {
    this.sound?.pause();
    this.sound = null;
    $("#hear").textContent = "Hear the voice";
  }

  // A recording ---------------------------------------------------------------------------------

  take(file) {
    $("#audio-input").value = "";
    if (!file) return;
    const wrong = unusable(file, this.limits, /^(audio|video)\//, SOUNDS, "a sound file");
    if (wrong) {
      showError("audio", wrong, $("#audio-choose"));
      return;
    }
    this.drop();
    this.audio = file;
    $("#audio-about").textContent = `${fileName(file.name)} · ${size(file.size)}`;
    $("#audio-play").src = URL.createObjectURL(file);
    $("#audio-play").hidden = $("#audio-remove").hidden = false;
  }

  drop() {
    showError("audio", null);
    this.audio = null;
    const player = $("#audio-play");
    if (player.src) URL.revokeObjectURL(player.src);
    player.removeAttribute("src");
    player.hidden = $("#audio-remove").hidden = true;
    $("#audio-about").textContent = "Drop recorded speech here";
  }
}

/** The first sentences of a text, or its first words. */
function opening(text) {
  if (text.length <= HEARD_CHARS) return text;
  const cut = text.slice(0, HEARD_CHARS);
  const end = Math.max(cut.lastIndexOf(". "), cut.lastIndexOf("! "), cut.lastIndexOf("? "), cut.lastIndexOf("。"));
  return end > 40 ? cut.slice(0, end + 1) : cut.slice(0, Math.max(cut.lastIndexOf(" "), 40));
}
