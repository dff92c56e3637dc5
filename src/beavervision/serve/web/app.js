// The studio page: from a face and words to a video, and everything that can go wrong on the way.

import { Problem, askForKey, ended, follow, getJson, hasKey, request, upload, videoOf } from "./api.js";
import { charts } from "./charts.js";
import { $, $$, h, seconds, tellRange, unique } from "./dom.js";
import { clearErrors, fieldOf, showError, titleOf } from "./errors.js";
import { ExpressionInput, smallPicture } from "./expression.js";
import { FaceInput } from "./face.js";
import { History, label } from "./history.js";
import { Player } from "./player.js";
import { WordsInput } from "./words.js";

const TITLE = document.title;
const STEPS = { sending: "Sending", waiting: "Waiting", preparing: "Looking and listening", drawing: "Drawing", done: "Done" };
const KEPT_SOURCES = 8; // of this page's jobs, to compare with
const LOOKING_MS = 10_000;
// What holds until the service tells its own.
const LIMITS = { upload_mb: 512, text_chars: 10_000, media_s: 600, side_px: 8192, keep_hours: 24, consent: true };

const limits = { ...LIMITS };
const sources = new Map(); // job id -> {kind, url, fit}
const history = new History(showJob, forgotten);
const face = new FaceInput(limits, lookAt);
const words = new WordsInput(limits);
const expression = new ExpressionInput(showPreview);

let look = null; // at the chosen face: {kind, url, source}
let current = null; // {id, abort, player} of the job that is shown
let sending = null; // {form, key, about, source} of a request that may be repeated

// What the page shows -------------------------------------------------------------------------------------------------

const PARTS = ["trouble", "progress", "result"];

/** Show some parts of the output and hide the others. */
function shows(...names) {
  for (const name of PARTS) $(`#${name}`).hidden = !names.includes(name);
  $("#view").hidden = $("#view-note").hidden = names.includes("result");
}

const say = (text) => {
  $("#announce").textContent = text;
};

function lookAt(seen) {
  look = seen;
  if (current && !$("#progress").hidden) return; // a job is at work: its progress stays in view
  leave();
  $("#output-title").textContent = "Preview";
  shows();
  showFace(seen);
}

function showFace(seen) {
  const view = $("#view");
  view.classList.toggle("empty", !seen?.url);
  if (!seen?.url) {
    const text = seen ? "A stored face." : "The face that you choose appears here.";
    view.replaceChildren(h("p", { class: "hint" }, text));
    $("#view-note").textContent = "";
    expression.setFace(null);
    return;
  }
  const moving = seen.kind === "video";
  const shown = moving
    ? h("video", { src: seen.url, controls: true, muted: true, playsinline: true, "aria-label": "The chosen video" })
    : h("img", { src: seen.url, alt: "The chosen face", id: "view-face" });
  shown.addEventListener(moving ? "loadeddata" : "load", async () => {
    if (look === seen) expression.setFace(await smallPicture(shown));
  });
  shown.addEventListener("error", () => {
    view.classList.add("empty");
    view.replaceChildren(h("p", { class: "hint" }, "This browser cannot show this file. The service may be able to use it."));
  });
  view.replaceChildren(shown);
  $("#view-note").textContent = "";
}

/** Show a face with an expression, or (null) the face as it is. */
function showPreview(url, what) {
  if (url && !$("#result").hidden) {
    leave(); // somebody tries expressions after a result: the face comes back into view
    $("#output-title").textContent = "Preview";
    shows();
  }
  const view = $("#view");
  if (!url && !$("#view-preview")) return;
  $("#view-preview")?.remove();
  for (const child of view.children) child.hidden = Boolean(url);
  if (url) view.append(h("img", { id: "view-preview", src: url, alt: what }));
  $("#view-note").textContent = what;
}

/** Say what went wrong: beside the field if it is about one, and with what can be done. */
function trouble(problem, actions = []) {
  const field = fieldOf({ code: problem.code, message: problem.message }, words.usesAudio);
  $("#trouble-title").textContent = titleOf(problem.code);
  $("#trouble-detail").textContent = problem.message;
  $("#trouble-actions").replaceChildren(...actions);
  $("#trouble-actions").hidden = !actions.length;
  $("#output-title").textContent = "Preview";
  shows("trouble");
  document.title = TITLE;
  if (field) showError(field, problem.message);
  const first = actions[0] ?? (field && { face: $("#face-choose"), text: $("#text"), audio: $("#audio-choose"), consent: $("#consent") }[field]);
  if (first) first.focus();
  else $("#output").focus();
}

const button = (text, onclick) => h("button", { type: "button", onclick }, text);

function asProblem(error) {
  if (error instanceof Problem) return error;
  console.error(error);
  return new Problem({});
}

// Making --------------------------------------------------------------------------------------------------------------

/** What is missing before anything can be sent; the focus goes to the first. */
function missing() {
  clearErrors();
  words.count();
  const wrong = [];
  if (!face.value) wrong.push(["face", "Choose a face first: a picture, a video or a shot with the webcam.", "#face-choose"]);
  if (words.usesAudio && !words.audio) wrong.push(["audio", "Choose a recording, or write a text instead.", "#audio-choose"]);
  const text = $("#text").value;
  if (!words.usesAudio && !text.trim()) wrong.push(["text", "Write what the face should say.", "#text"]);
  if (!words.usesAudio && [...text].length > limits.text_chars) wrong.push(["text", $("#text-error").textContent, "#text"]);
  if (limits.consent && !$("#consent").checked)
    wrong.push(["consent", "Confirm that you have the right to use this face and this voice.", "#consent"]);
  for (const [field, message] of wrong) showError(field, message);
  if (wrong.length) {
    const field = wrong[0][0] === "face" && $("#face-file").hidden ? 'input[name="face-from"]:checked' : wrong[0][2];
    $(field).focus();
  }
  return wrong.length > 0;
}

function form() {
  const { file, avatar } = face.value;
  const made = new FormData();
  const settings = { fit: $("#fit").value, keep_audio: Number($("#keep").value) };
  if (file) settings.face = $("#which").value; // a stored face was chosen when it was stored
  if ($("#model").value) settings.model = $("#model").value;
  if (expression.value) settings.expression = expression.value;
  if (expression.style) settings.style = expression.style;
  if ($("#alive").value) settings.alive = $("#alive").value === "yes";
  if ($("#restore").value) settings.restore = $("#restore").value;
  if (!words.usesAudio) Object.assign(settings, words.settings);
  made.append("settings", JSON.stringify(settings));
  made.append("consent", String($("#consent").checked));
  if (words.usesAudio) made.append("audio", words.audio, "audio");
  else made.append("text", $("#text").value);
  if (avatar) made.append("avatar", avatar);
  else made.append("video", file, "video");
  return made;
}

async function make(event) {
  event.preventDefault();
  if (missing()) return;
  words.hush();
  const about = words.usesAudio ? words.audio.name : $("#text").value.trim();
  const source = look?.source ? { kind: look.kind, blob: look.source, fit: $("#fit").value } : null;
  sending = { form: form(), key: unique(), about, source };
  await send();
}

/** Send what was put together. The same key goes with every attempt, so that none makes a second job. */
async function send() {
  const { form: content, key, about, source } = sending;
  leave();
  const abort = new AbortController();
  current = { id: null, abort, player: null };
  begin();
  step("sending");
  $("#output").scrollIntoView({ block: "nearest" });
  let job;
  try {
    job = await upload("lipsync", content, {
      headers: { Prefer: "respond-async", "Idempotency-Key": key },
      signal: abort.signal,
      onSent: (share) => {
        $("#bar").value = share;
        $("#progress-what").textContent = share < 1 ? `Sending, ${Math.round(share * 100)} %` : "The service looks at it";
        if (share >= 1) $("#bar").removeAttribute("value");
      },
    });
  } catch (error) {
    $("#submit").disabled = false;
    if (error.name === "AbortError") {
      stopped();
      return;
    }
    const problem = asProblem(error);
    const passing = problem.code === "unreachable" || [429, 503, 507].includes(problem.status);
    current = null;
    trouble(problem, passing ? [button("Try again", send)] : []);
    return;
  }
  label(job.id, about);
  if (source) keep(job.id, source);
  history.load();
  await watch(job);
}

/** Keep what a job was made from, to compare with. */
function keep(id, { kind, blob, fit }) {
  sources.set(id, { kind, url: URL.createObjectURL(blob), fit });
  if (sources.size > KEPT_SOURCES) drop(sources.keys().next().value);
}

function drop(id) {
  const kept = sources.get(id);
  if (kept) URL.revokeObjectURL(kept.url);
  sources.delete(id);
}

function begin() {
  $("#submit").disabled = true;
  $("#output-title").textContent = "Making the video";
  $("#progress-figures").replaceChildren();
  $("#progress-left").textContent = "";
  $("#cancel").disabled = false;
  shows("progress");
}

/** Mark where a job is. */
function step(now) {
  const names = Object.keys(STEPS);
  const at = names.indexOf(now);
  const items = names.map((name, index) => {
    const state = index < at || now === "done" ? "done" : index === at ? "now" : "later";
    return h("li", { "data-state": state, "aria-current": state === "now" ? "step" : null }, STEPS[name]);
  });
  $("#steps").replaceChildren(...items);
}

/** Follow a job to its end, and show what came of it. */
async function watch(job) {
  const { abort } = current;
  current.id = job.id;
  window.history.replaceState(null, "", `#job=${job.id}`);
  let last = job;
  let told = "";
  const progressed = (seen) => {
    last = seen;
    if (!$("#trouble").hidden) shows("progress");
    told = tellProgress(seen, told);
  };
  progressed(job);
  try {
    if (!ended(job)) {
      await follow(job.id, {
        onJob: progressed,
        onGone: (pause_s, now) => broken(pause_s, now),
        onBack: () => say("The service answers again."),
        signal: abort.signal,
      });
    }
  } catch (error) {
    if (abort.signal.aborted) return;
    $("#submit").disabled = false;
    current = null;
    window.history.replaceState(null, "", location.pathname);
    trouble(asProblem(error));
    history.load();
    return;
  }
  $("#submit").disabled = false;
  document.title = TITLE;
  history.load();
  if (last.state === "succeeded") await showResult(last);
  else if (last.state === "cancelled") stopped();
  else failed(last);
}

function broken(pause_s, now) {
  $("#trouble-title").textContent = titleOf("unreachable");
  $("#trouble-detail").textContent =
    `The job is safe: it goes on, or begins again, when the service runs. The next look is in ${pause_s} s.`;
  $("#trouble-actions").replaceChildren(button("Look now", now));
  $("#trouble-actions").hidden = false;
  shows("trouble", "progress");
}

/** Put a job's progress into words, and announce what is new in it. Gives what was announced last. */
function tellProgress(job, told) {
  const { stage, pictures, pictures_expected: all, pictures_per_s: rate, remaining_s: left } = job.progress;
  step(stage);
  const bar = $("#bar");
  if (all && stage === "drawing") bar.value = Math.min(pictures / all, 1);
  else bar.removeAttribute("value");
  const what = {
    waiting: "Waiting for a worker",
    preparing: "Looking at the face, listening to the words",
    drawing: all ? `Picture ${pictures} of ${all}` : `Picture ${pictures}`,
    done: "Done",
  }[stage];
  $("#progress-what").textContent = what;
  $("#progress-left").textContent = left !== null && stage === "drawing" ? `about ${seconds(left)} left` : "";
  const figures = [];
  if (rate > 0) figures.push(["Speed", `${rate.toFixed(1)} pictures/s`]);
  if (job.attempts > 1) figures.push(["Attempt", String(job.attempts)]);
  $("#progress-figures").replaceChildren(
    ...figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
  const share = all ? pictures / all : 0;
  if (stage === "drawing" && all) document.title = `${Math.round(Math.min(share, 1) * 100)} % · ${TITLE}`;
  const quarter = stage === "drawing" ? ` ${Math.floor(Math.min(share, 1) * 4) * 25} %` : "";
  const now = `${STEPS[stage]}${quarter}`;
  if (now !== told) say(now);
  return now;
}

async function cancel() {
  $("#cancel").disabled = true;
  const { id, abort } = current;
  if (!id) {
    abort.abort();
    return;
  }
  try {
    await request(`jobs/${id}/cancel`, { method: "POST" });
  } catch (error) {
    $("#cancel").disabled = false;
    $("#trouble-title").textContent = titleOf(error.code);
    $("#trouble-detail").textContent = asProblem(error).message;
    $("#trouble-actions").hidden = true;
    shows("trouble", "progress");
  }
}

function stopped() {
  current = null;
  window.history.replaceState(null, "", location.pathname);
  $("#output-title").textContent = "Preview";
  shows();
  showFace(look);
  $("#view-note").textContent = "Cancelled; nothing was kept.";
  say("Cancelled.");
  $("#submit").focus();
}

function failed(job) {
  current = null;
  window.history.replaceState(null, "", location.pathname);
  trouble(new Problem({ code: job.error?.code, detail: job.error?.message }));
}

// The result ----------------------------------------------------------------------------------------------------------

async function showResult(job) {
  let drawn = { at: () => {} };
  const player = new Player($("#player"), videoOf(job), sources.get(job.id) ?? null, {
    onTime: (time_s) => drawn.at(time_s),
    onLost: () => lost(job.id),
  });
  current = { id: job.id, abort: new AbortController(), player };
  window.history.replaceState(null, "", `#job=${job.id}`);
  $("#output-title").textContent = "Result";
  $("#download").href = videoOf(job);
  $("#charts").replaceChildren();
  $("#result-notes").hidden = true;
  shows("result");
  say(`The video is done: ${seconds(job.seconds ?? 0)}.`);
  $("#output").focus({ preventScroll: true });
  let report;
  try {
    report = await getJson(`jobs/${job.id}/report`);
  } catch {
    return; // the video is there; the figures are not
  }
  if (current?.player !== player) return;
  drawn = charts($("#charts"), report, (time_s) => player.seekTo(time_s));
  const notes = notesOf(report);
  $("#result-notes").replaceChildren(...notes.map((note) => h("li", {}, note)));
  $("#result-notes").hidden = !notes.length;
  const file = new Blob([JSON.stringify(report, null, 1)], { type: "application/json" });
  URL.revokeObjectURL($("#download-report").href);
  $("#download-report").href = URL.createObjectURL(file);
  $("#download-report").download = `${job.id}.json`;
}

function notesOf(report) {
  const states = { lost: "the face was not seen", profile: "the face was turned away", occluded: "the mouth was covered", cut: "a new shot began" };
  const gaps = (report.track?.not_drawn ?? []).filter((gap) => gap.state !== "cut");
  const shown = gaps.slice(0, 5).map((gap) => `From ${gap.from_s.toFixed(1)} to ${gap.to_s.toFixed(1)} s ${states[gap.state]}; the picture stays as it was.`);
  if (gaps.length > 5) shown.push(`${gaps.length - 5} more such stretches are in the report.`);
  return [...(report.notes ?? []), ...shown];
}

/** The link has expired, or the video is gone: ask the job for a new one, once. */
async function lost(id) {
  const again = current;
  if (!again?.player || again.id !== id || again.retried) return;
  again.retried = true;
  try {
    const job = await getJson(`jobs/${id}`);
    if (current !== again) return;
    again.player.video.src = videoOf(job);
    $("#download").href = videoOf(job);
  } catch (error) {
    if (current === again) trouble(asProblem(error));
  }
}

/** Show a job of the list. */
async function showJob({ id }) {
  let job;
  try {
    job = await getJson(`jobs/${id}`);
  } catch (error) {
    leave();
    trouble(asProblem(error));
    return;
  }
  leave();
  $("#output").scrollIntoView({ block: "start" });
  if (job.state === "succeeded") await showResult(job);
  else if (job.state === "failed") failed(job);
  else if (job.state === "cancelled") stopped();
  else {
    current = { id, abort: new AbortController(), player: null };
    begin();
    await watch(job);
  }
}

/** Leave the job that is shown; it goes on without being watched. */
function leave() {
  current?.abort.abort();
  current?.player?.close();
  current = null;
  $("#submit").disabled = false;
  document.title = TITLE;
  window.history.replaceState(null, "", location.pathname);
}

function forgotten(id) {
  drop(id);
  if (current?.id !== id) return;
  leave();
  $("#output-title").textContent = "Preview";
  shows();
  showFace(look);
}

// The page itself -----------------------------------------------------------------------------------------------------

async function loadModels() {
  const models = (await getJson("models")).filter((one) => one.usable);
  const list = (place, kind, first) => {
    const named = models.filter((one) => one.kind === kind).map((one) => h("option", { value: one.name }, one.name));
    $(place).replaceChildren(h("option", { value: "" }, first), ...named);
    return named.length;
  };
  list("#model", "lipsync", "the usual one");
  $("#restore-field").hidden = !list("#restore", "restore", "nothing");
}

/** Ask the service what it can do. Without an answer the page says so, and looks again. */
async function load() {
  try {
    Object.assign(limits, (await getJson("status")).limits);
    $("#consent").required = limits.consent;
    words.count();
    await Promise.all([words.loadVoices(), loadModels(), face.loadAvatars(), expression.load(), history.load()]);
  } catch (error) {
    const problem = asProblem(error);
    trouble(problem, [button(problem.status === 401 ? "Enter a key" : "Try again", load)]);
    return;
  }
  if (!$("#trouble").hidden) shows();
  const asked = /^#job=([0-9a-f]{24})$/.exec(location.hash);
  if (asked) await showJob({ id: asked[1] });
}

const tellKeep = () => tellRange("keep", `${Math.round($("#keep").value * 100)} %`);
$("#keep").addEventListener("input", tellKeep);
tellKeep();
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
$("#consent").addEventListener("change", () => showError("consent", null));
$("#make").addEventListener("submit", make);
$("#cancel").addEventListener("click", cancel);
$("#key-button").addEventListener("click", async () => {
  if (await askForKey()) await load();
});
setInterval(() => {
  if (!document.hidden && $$("#jobs .state").some((state) => ["queued", "running"].includes(state.dataset.state))) history.load();
}, LOOKING_MS);
$("#key-button").hidden = !hasKey();
load();
