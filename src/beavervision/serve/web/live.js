// A live session: opened here, watched by WebRTC or, where that does not connect, by fragmented MP4 over WebSocket.

import { askForKey, getJson, hasKey, request, sendJson, upload } from "./api.js";
import { $, h, languageName } from "./dom.js";
import { keepInStep } from "./live-sync.js";

const CONNECT_MS = 6000; // for WebRTC, before the fallback
const GATHER_MS = 500;
const LAG_S = 0.35; // behind the newest picture, from which the fallback plays a little faster,
const JUMP_S = 1.5; // and from which it jumps
const KEPT_S = 20; // of what was played
const MICROPHONE_HZ = 16000;

const screen = $("#screen");
let live = null; // the session, how it is watched, and what else is open for it

// Watching ------------------------------------------------------------------------------------------------------------

/** Offer on `connection` and take the answer of `url`; gives the address that ends it. */
async function negotiate(connection, url) {
  await connection.setLocalDescription();
  await new Promise((resolve) => {
    const done = () => connection.iceGatheringState === "complete" && resolve();
    connection.addEventListener("icegatheringstatechange", done);
    setTimeout(resolve, GATHER_MS);
    done();
  });
  const response = await request(path(url), {
    method: "POST",
    headers: { "Content-Type": "application/sdp" },
    body: connection.localDescription.sdp,
  });
  await connection.setRemoteDescription({ type: "answer", sdp: await response.text() });
  return response.headers.get("Location");
}

/** Gives what ends it; fails if nothing arrives in time. */
async function watchByWebRtc(media) {
  const connection = new RTCPeerConnection({ iceServers: media.ice_servers });
  let address = null;
  try {
    for (const kind of ["video", "audio"]) connection.addTransceiver(kind, { direction: "recvonly" });
    const stream = new MediaStream();
    connection.addEventListener("track", ({ track }) => stream.addTrack(track));
    keepInStep(connection);
    address = await negotiate(connection, media.whep);
    screen.srcObject = stream;
    await within(CONNECT_MS, firstPicture());
  } catch (error) {
    connection.close();
    if (address) request(address, { method: "DELETE" }).catch(() => {});
    screen.srcObject = null;
    throw error;
  }
  connection.addEventListener("connectionstatechange", () => {
    if (["failed", "disconnected"].includes(connection.connectionState)) lost("The connection broke.");
  });
  return { way: "WebRTC", end: () => connection.close(), waiting: () => waitingOf(connection) };
}

/** How long the newest pictures and sounds waited in this browser before they were played, in seconds. */
async function waitingOf(connection) {
  let waited = 0;
  for (const report of (await connection.getStats()).values()) {
    if (report.type === "inbound-rtp" && report.kind === "video" && report.jitterBufferEmittedCount) {
      waited = report.jitterBufferDelay / report.jitterBufferEmittedCount;
    }
  }
  return waited;
}

async function watchByWebSocket(media) {
  const Source = window.ManagedMediaSource ?? window.MediaSource;
  if (!Source) throw new Error("This browser can play neither WebRTC nor streamed MP4.");
  const socket = new WebSocket(socketPath(media.websocket));
  socket.binaryType = "arraybuffer";
  const source = new Source();
  screen.disableRemotePlayback = true;
  screen.srcObject = null;
  screen.src = URL.createObjectURL(source);
  const opened = new Promise((resolve) => source.addEventListener("sourceopen", resolve, { once: true }));
  const tracks = new Map();
  const keepUp = setInterval(() => follow(tracks), 250);
  const end = () => {
    clearInterval(keepUp);
    socket.onclose = null;
    socket.close();
    for (const track of tracks.values()) track.end();
    tracks.clear();
    URL.revokeObjectURL(screen.src);
    screen.removeAttribute("src");
    screen.load();
  };
  const waiting = [];
  let ready = false;
  socket.onmessage = async ({ data }) => {
    if (typeof data === "string") {
      await opened;
      for (const { track, mime } of JSON.parse(data).tracks) tracks.set(track, new Track(source.addSourceBuffer(mime)));
      ready = true;
      waiting.splice(0).forEach(take);
    } else if (ready) take(data);
    else waiting.push(data);
  };
  const take = (data) => tracks.get(new Uint8Array(data, 0, 1)[0])?.append(new Uint8Array(data, 1));
  const refused = new Promise((_, reject) => {
    socket.onclose = ({ reason }) => reject(new Error(reason || "The service ended the connection."));
  });
  try {
    await within(CONNECT_MS, Promise.race([firstPicture(), refused]));
  } catch (error) {
    end();
    throw error;
  }
  socket.onclose = ({ reason }) => lost(reason || "The connection broke.");
  return { way: "WebSocket", end, waiting: async () => Math.max(0, newest(tracks) - screen.currentTime) };
}

/** A SourceBuffer that is given one piece after another. */
class Track {
  constructor(buffer) {
    this.buffer = buffer;
    this.queue = [];
    buffer.addEventListener("updateend", this.next);
  }

  /** To be called before the buffer is taken off its source: after that it cannot even be asked what it holds. */
  end() {
    this.buffer.removeEventListener("updateend", this.next);
    this.queue = [];
  }

  append(piece) {
    this.queue.push(piece);
    this.next();
  }

  next = () => {
    if (this.buffer.updating) return;
    const { buffered } = this.buffer;
    if (buffered.length && screen.currentTime - buffered.start(0) > 2 * KEPT_S) {
      this.buffer.remove(0, screen.currentTime - KEPT_S);
    } else if (this.queue.length) {
      const all = new Uint8Array(this.queue.reduce((sum, piece) => sum + piece.length, 0));
      let at = 0;
      for (const piece of this.queue.splice(0)) {
        all.set(piece, at);
        at += piece.length;
      }
      try {
        this.buffer.appendBuffer(all);
      } catch {
        lost("This browser cannot play the stream any further.");
      }
    }
  };
}

/** The time of the newest picture whose sound is there too. */
function newest(tracks) {
  const ends = [...tracks.values()].map(({ buffer: { buffered } }) => (buffered.length ? buffered.end(buffered.length - 1) : 0));
  return ends.length ? Math.min(...ends) : 0;
}

/** Stay near the newest picture: begin there, play a little faster when behind, jump when far behind. */
function follow(tracks) {
  const end = newest(tracks);
  if (!end) return;
  const behind = end - screen.currentTime;
  if (behind > JUMP_S || behind < -0.5) screen.currentTime = Math.max(0, end - 0.15);
  screen.playbackRate = behind > LAG_S && behind <= JUMP_S ? 1.08 : 1;
  if (screen.paused) screen.play().catch(() => {});
}

const firstPicture = () => new Promise((resolve) => screen.requestVideoFrameCallback(resolve));

const within = (ms, work) =>
  Promise.race([work, new Promise((_, reject) => setTimeout(() => reject(new Error("No picture came in time.")), ms))]);

// The addresses name the service as it calls itself; this page asks where it came from.
const path = (url) => {
  const { pathname, search } = new URL(url);
  return pathname + search;
};
const socketPath = (url) => `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path(url)}`;

async function watch(session, via) {
  if (via === "websocket") return watchByWebSocket(session.media);
  try {
    return await watchByWebRtc(session.media);
  } catch (error) {
    if (via === "webrtc") throw error;
    state("WebRTC does not connect. Trying a WebSocket …");
    return watchByWebSocket(session.media);
  }
}

// The session ---------------------------------------------------------------------------------------------------------

async function openSession() {
  const kind = $("#face").value;
  const settings = { voice: $("#voice").value || null, consent: $("#consent").checked };
  if (kind === "camera") return (await sendJson("sessions", { ...settings, camera: true })).json();
  if (kind !== "sample" && kind !== "file") return (await sendJson("sessions", { ...settings, avatar: kind })).json();
  let face = $("#face-file").files[0];
  if (kind === "sample") face = await (await fetch(new URL("sample.png", import.meta.url))).blob();
  if (!face) throw new Error("Choose a picture or a video of a face first.");
  const form = new FormData();
  form.append("video", face, "face");
  form.append("settings", JSON.stringify(settings));
  return upload("sessions", form);
}

async function start() {
  const via = $("#via").value;
  state("Preparing the face …");
  const session = await openSession();
  live = { session, address: `sessions/${session.id}`, watched: null, microphone: null, camera: null };
  try {
    if (session.camera) live.camera = await bringCamera(session.media);
    state("Connecting …");
    live.watched = await watch(session, via);
  } catch (error) {
    await stop();
    throw error;
  }
  $("#way").textContent = live.watched.way;
  live.timer = setInterval(measure, 1000);
  shown(true);
  state("Live.");
  $("#text").focus();
}

async function stop() {
  const ending = live;
  live = null;
  if (!ending) return;
  clearInterval(ending.timer);
  ending.microphone?.end();
  ending.camera?.end();
  ending.watched?.end();
  shown(false);
  state("The session has ended.");
  await request(ending.address, { method: "DELETE", keepalive: true }).catch(() => {});
}

function lost(why) {
  if (!live) return;
  stop();
  told("open", `${why} Begin again.`);
}

/** Send this browser's camera by WHIP. */
async function bringCamera(media) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480, frameRate: 25 } });
  const connection = new RTCPeerConnection({ iceServers: media.ice_servers });
  const end = () => {
    stream.getTracks().forEach((track) => track.stop());
    connection.close();
  };
  try {
    for (const track of stream.getTracks()) connection.addTransceiver(track, { direction: "sendonly", streams: [stream] });
    await negotiate(connection, media.whip);
  } catch (error) {
    end();
    throw error;
  }
  return { end };
}

// Speaking ------------------------------------------------------------------------------------------------------------

/** Send the microphone as PCM16 over a WebSocket: that works wherever this page does. */
async function openMicrophone(media) {
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
  });
  const context = new AudioContext({ sampleRate: MICROPHONE_HZ });
  const socket = new WebSocket(`${socketPath(media.audio)}&rate=${MICROPHONE_HZ}`);
  const end = () => {
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    socket.onclose = null;
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "end" }));
    socket.close();
  };
  const opened = new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onclose = ({ reason }) => reject(new Error(reason || "The service does not take the microphone."));
  });
  try {
    await Promise.all([opened, context.audioWorklet.addModule(new URL("live-microphone.js", import.meta.url))]);
  } catch (error) {
    end();
    throw error;
  }
  socket.onclose = ({ reason }) => {
    hush();
    told("talk", reason || "The connection of the microphone broke. Talk again.");
  };
  const node = new AudioWorkletNode(context, "microphone");
  node.port.onmessage = ({ data }) => socket.readyState === WebSocket.OPEN && socket.send(data);
  context.createMediaStreamSource(stream).connect(node);
  return { end };
}

function hush() {
  live?.microphone?.end();
  if (live) live.microphone = null;
  $("#microphone").setAttribute("aria-pressed", "false");
  $("#microphone").textContent = "Talk";
}

let resting = 0;

function express() {
  const intensity = Number($("#intensity").value);
  $("#intensity-out").textContent = intensity.toFixed(2);
  clearTimeout(resting);
  resting = setTimeout(() => {
    const preset = $("#preset").value;
    tried("talk", () =>
      request(`${live.address}/expression`, {
        method: "PUT",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ expression: preset ? `${preset}:${intensity}` : "" }),
      }),
    );
  }, 60);
}

// What is shown -------------------------------------------------------------------------------------------------------

let counted = { pictures: 0, at: 0 };

async function measure() {
  const { totalVideoFrames: pictures } = screen.getVideoPlaybackQuality();
  const now = performance.now();
  const fps = ((pictures - counted.pictures) * 1000) / (now - counted.at);
  counted = { pictures, at: now };
  $("#fps").textContent = `${Math.max(0, fps).toFixed(1)} / s`;
  const watched = live?.watched;
  if (!watched) return;
  const total = live.session.delay.total_ms + (await watched.waiting()) * 1000;
  $("#delay").textContent = `${Math.round(total)} ms`;
}

const state = (text) => ($("#state").textContent = text);

function shown(running) {
  $("#talk").hidden = $("#figures").hidden = $("#stop").hidden = !running;
  $("#start").hidden = running;
  for (const id of ["face", "face-file", "voice", "via", "consent"]) $(`#${id}`).disabled = running;
  if (!running) hush();
}

function told(place, message) {
  $(`#${place}-error`).textContent = message ?? "";
  $(`#${place}-error`).hidden = !message;
}

const CAMERA = "The browser does not allow it. Allow the camera and the microphone for this page, and try again.";

async function tried(place, work) {
  told(place, null);
  try {
    await work();
  } catch (error) {
    told(place, error.name === "NotAllowedError" ? CAMERA : error.detail ?? error.message);
    if (!live) state("Nothing is running.");
  }
}

async function load() {
  const [avatars, voices, expressions] = await Promise.all([
    getJson("avatars").catch(() => []),
    getJson("voices"),
    getJson("expressions").catch(() => []),
  ]);
  $("#face").prepend(...avatars.filter((a) => a.state === "ready").map((a) => h("option", { value: a.id }, a.name)));
  $("#face").selectedIndex = 0;
  const usable = voices.filter((voice) => !voice.unavailable);
  $("#voice").append(...usable.map((v) => h("option", { value: v.name }, `${v.name} (${languageName(v.language)})`)));
  const presets = expressions.filter((known) => known.kind === "preset" || known.kind === "custom");
  $("#preset").append(...presets.map((known) => h("option", { value: known.name }, known.name)));
  $("#expression").hidden = !presets.length;
}

$("#face").addEventListener("change", () => ($("#face-file").hidden = $("#face").value !== "file"));
$("#open").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("#start").disabled = true;
  await tried("open", start);
  $("#start").disabled = false;
});
$("#stop").addEventListener("click", stop);
$("#say").addEventListener("submit", (event) => {
  event.preventDefault();
  tried("talk", () => sendJson(`${live.address}/say`, { text: $("#text").value }));
});
$("#text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#say").requestSubmit();
});
$("#interrupt").addEventListener("click", () => tried("talk", () => sendJson(`${live.address}/interrupt`, {})));
$("#microphone").addEventListener("click", async () => {
  if (live.microphone) return hush();
  await tried("talk", async () => {
    live.microphone = await openMicrophone(live.session.media);
    $("#microphone").setAttribute("aria-pressed", "true");
    $("#microphone").textContent = "Stop talking";
  });
});
$("#preset").addEventListener("change", express);
$("#intensity").addEventListener("input", express);
$("#key-button").addEventListener("click", async () => {
  if (await askForKey()) await load();
});
addEventListener("pagehide", stop);
$("#key-button").hidden = !hasKey();
tried("open", load);
