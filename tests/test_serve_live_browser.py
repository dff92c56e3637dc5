"""The live page in a real Chromium with its fake camera and microphone: by WebRTC, by the fallback, and together.

Where the face itself matters the sessions are real ones; for clocks they flash and beep.
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiortc", reason="live sessions need the extra live")
pytest.importorskip("playwright.sync_api", reason="needs the extra browser")

from playwright.sync_api import Browser, Page, sync_playwright

from tests.answers import until
from tests.live_server import LiveServer, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
PATIENCE_S = 90.0
BASE = "/api/v1/sessions"
SYNC = files("beavervision") / "serve" / "web" / "live-sync.js"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

# The luma of the middle of the picture, and the loudness of what is heard, as often as the browser paints.
WATCH = """() => {
  const video = document.querySelector("#screen");
  const canvas = new OffscreenCanvas(8, 8).getContext("2d", { willReadFrequently: true });
  const seen = (window.seen = { pictures: [], sounds: [] });
  const look = () => {
    canvas.drawImage(video, 0, 0, 8, 8);
    seen.pictures.push([performance.now(), canvas.getImageData(4, 4, 1, 1).data[1]]);
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
  const context = new AudioContext();
  const source = video.srcObject ? context.createMediaStreamSource(video.srcObject) : context.createMediaElementSource(video);
  const meter = new AnalyserNode(context, { fftSize: 256 });
  source.connect(meter);
  if (!video.srcObject) meter.connect(context.destination);
  const wave = new Float32Array(256);
  setInterval(() => {
    meter.getFloatTimeDomainData(wave);
    seen.sounds.push([performance.now(), Math.max(...wave)]);
  }, 4);
}"""


# How far the mouth of the sample portrait, in its 512 pixels, has been from what it was at first.
MOUTH = """() => {
  const video = document.querySelector("#screen");
  const canvas = new OffscreenCanvas(60, 40).getContext("2d", { willReadFrequently: true });
  let first = null;
  window.moved = 0;
  const look = () => {
    canvas.drawImage(video, 196, 130, 60, 40, 0, 0, 60, 40);
    const { data } = canvas.getImageData(0, 0, 60, 40);
    first ??= data;
    window.moved = Math.max(window.moved, data.reduce((sum, v, i) => sum + Math.abs(v - first[i]), 0) / 60 / 40 / 3);
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def flashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with served(tmp_path_factory.mktemp("flashes"), flashing=True) as server:
        yield server


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with served(tmp_path_factory.mktemp("faces"), flashing=False) as server:
        yield server


@pytest.fixture
def live(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server and begins a session. In the end nothing may have gone wrong in it."""
    contexts, troubles = [], []

    def begin(server: LiveServer, via: str = "", face: str = "sample", before: str | None = None) -> Page:
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        contexts.append(context)
        if before is not None:
            context.add_init_script(before)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.goto(f"http://127.0.0.1:{server.port}/live")
        holds(page, "document.querySelector('#voice').options.length > 1")
        page.select_option("#face", face)
        page.select_option("#via", via)
        page.check("#consent")
        page.click("#start")
        told = "[document.querySelector('#state').textContent, document.querySelector('#open-error').textContent]"
        holds(page, f"{told}[0] == 'Live.' || {told}[1] != ''")
        assert page.evaluate(told) == ["Live.", ""]
        return page

    yield begin
    for context in contexts:
        context.close()
    assert troubles == []


def holds(page: Page, what: str) -> None:
    """Wait until an expression is true (the page's policy forbids Playwright's own way to)."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not page.evaluate(what):
        assert time.monotonic() < deadline_s, f"it never held: {what}"
        page.wait_for_timeout(50)


def session(server: LiveServer) -> dict[str, Any]:
    (only,) = server.call("GET", BASE).json["sessions"]
    return dict(only)


def apart_ms(page: Page) -> np.ndarray[Any, Any]:
    """How much later than its flash each beep was heard."""
    seen = page.evaluate("window.seen")
    rises = []
    for what, least in (("pictures", 128), ("sounds", 0.2)):
        times, values = np.array(seen[what]).T
        on = values > least
        begun = np.flatnonzero(on[1:] & ~on[:-1]) + 1
        kept = begun[np.concatenate([[True], np.diff(times[begun]) > 200])] if len(begun) else begun
        rises.append(times[kept])
    flashes, beeps = rises
    return np.array([beeps[np.abs(beeps - flash).argmin()] - flash for flash in flashes[1:-1]])


@pytest.mark.parametrize(("via", "way"), [("", "WebRTC"), ("websocket", "WebSocket")])
def test_flash_and_beep_meet_in_the_browser(
    flashing: LiveServer, live: Callable[..., Page], via: str, way: str
) -> None:
    page = live(flashing, via)
    assert page.text_content("#way") == way
    page.evaluate(WATCH)
    holds(page, "window.seen.pictures.filter(([, luma]) => luma > 128).length >= 12")
    apart = apart_ms(page)
    assert len(apart) >= 6
    assert abs(np.median(apart)) < 60, "of these the painting of the screen takes up to 17, the meter up to 10"
    holds(page, "parseFloat(document.querySelector('#fps').textContent) > 15")
    assert 150 < float(page.text_content("#delay").removesuffix(" ms")) < 3000
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")
    holds(page, "fetch('/api/v1/sessions').then((r) => r.json()).then((all) => all.sessions.length == 0)")


BUFFERS = """(() => {
  const add = MediaSource.prototype.addSourceBuffer;
  window.buffers = [];
  MediaSource.prototype.addSourceBuffer = function (mime) {
    window.buffers.push(add.call(this, mime));
    return window.buffers.at(-1);
  };
})()"""


def test_a_buffer_that_finishes_after_the_end_is_left_alone(flashing: LiveServer, live: Callable[..., Page]) -> None:
    page = live(flashing, "websocket", before=BUFFERS)
    assert page.evaluate("window.buffers.length") == 2
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")
    page.evaluate("window.buffers.forEach((buffer) => buffer.dispatchEvent(new Event('updateend')))")


# A connection whose pictures are `early` ms ahead of their sound, if neither waits longer than is asked of it at first.
APART = """async (sync) => {
  window.fake = new EventTarget();
  const video = { track: { kind: "video" } }, audio = { track: { kind: "audio" } };
  window.held = () => [video.jitterBufferTarget, audio.jitterBufferTarget];
  window.apart = () => fake.early - (video.jitterBufferTarget - fake.least) + audio.jitterBufferTarget;
  fake.getReceivers = () => [video, audio];
  fake.getStats = async () => new Map([
    ["a", { type: "inbound-rtp", kind: "video", estimatedPlayoutTimestamp: 4e12 + apart() }],
    ["b", { type: "inbound-rtp", kind: "audio", estimatedPlayoutTimestamp: 4e12 }],
    ["c", { type: "transport" }],
  ]);
  (await import(sync)).keepInStep(fake);
  fake.dispatchEvent(new Event("track"));
  fake.least = video.jitterBufferTarget;
}"""


def test_sound_and_picture_that_the_browser_leaves_apart_are_brought_in_step(browser: Browser) -> None:
    page = browser.new_page()
    try:
        page.clock.install()
        page.evaluate(APART, f"data:text/javascript;base64,{base64.b64encode(SYNC.read_bytes()).decode()}")
        least_ms, sound_ms = page.evaluate("held()")
        assert (least_ms > 0, sound_ms) == (True, 0)
        for early_ms in (30, -40):  # one waits longer then, never both
            page.evaluate("(ms) => { fake.early = ms; }", early_ms)
            page.clock.run_for(20_000)
            picture_ms, sound_ms = page.evaluate("held()")
            assert abs(page.evaluate("apart()")) < 5
            assert (picture_ms > least_ms, sound_ms > 0) == (early_ms > 0, early_ms < 0)
        page.evaluate("fake.connectionState = 'closed', fake.early = 90")
        page.clock.run_for(20_000)
        assert page.evaluate("held()") == [picture_ms, sound_ms]
    finally:
        page.close()


def test_without_webrtc_the_page_falls_back_by_itself(flashing: LiveServer, live: Callable[..., Page]) -> None:
    page = live(
        flashing, before="RTCPeerConnection.prototype.setRemoteDescription = () => Promise.reject(new Error('no'))"
    )
    assert page.text_content("#way") == "WebSocket"
    assert session(flashing)["facts"]["viewers"] == {"webrtc": 0, "websocket": 1, "hls": 0, "rtmp": 0}
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")


def test_typing_talking_stopping_and_expressions_reach_the_session(
    flashing: LiveServer, live: Callable[..., Page]
) -> None:
    page = live(flashing)
    source = flashing.source(session(flashing))
    page.fill("#text", "Good morning.")
    page.click("text=Say it")
    page.click("#microphone")
    holds(page, "document.querySelector('#microphone').textContent == 'Stop talking'")
    heard = len(source.heard)
    while len(source.heard) < heard + 32_000:  # a second, the beep of Chromium's fake microphone in it
        page.wait_for_timeout(50)
    assert set(source.rates) == {16_000}
    assert np.abs(np.frombuffer(bytes(source.heard), "<i2")).max() > 1000
    page.click("#microphone")
    page.click("#interrupt")
    page.select_option("#preset", index=1)
    preset = page.input_value("#preset")
    page.evaluate(
        "() => { const s = document.querySelector('#intensity'); s.value = 0.8; s.dispatchEvent(new Event('input')) }"
    )
    while not source.expressions or not source.ends or not source.interrupts:
        page.wait_for_timeout(50)
    assert source.said == ["Good morning."]
    assert source.expressions[-1] == f"{preset}:0.8"
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")
    until(lambda: source.closed)


def test_the_fake_camera_becomes_the_face(flashing: LiveServer, live: Callable[..., Page]) -> None:
    page = live(flashing, face="camera")
    source = flashing.source(session(flashing))
    while len(source.pictures) < 10:
        page.wait_for_timeout(50)
    assert source.pictures[-1].y.shape == (source.size_px[1], source.size_px[0]) == (384, 512)
    assert source.pictures[-1].y.std() > 10
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")


@pytest.mark.parametrize("via", ["webrtc", "websocket"])
def test_a_real_face_speaks_in_the_browser(speaking: LiveServer, live: Callable[..., Page], via: str) -> None:
    page = live(speaking, via)
    page.evaluate(WATCH)
    page.evaluate(MOUTH)
    page.fill("#text", "Papa moved away, and nobody ever asked him why.")
    deadline_s = time.monotonic() + PATIENCE_S
    while page.evaluate("window.moved") < 3:  # a machine that is very busy shows a still face to the first words
        assert time.monotonic() < deadline_s, "the lips never moved"
        page.click("text=Say it")
        page.wait_for_timeout(3000)
    holds(page, "Math.max(...window.seen.sounds.map(([, level]) => level)) > 0.1")
    facts = session(speaking)["facts"]
    assert facts["say_ms"]["p50"] is not None and facts["pictures"]["drawn"] > 0
    page.click("#stop")
    holds(page, "document.querySelector('#state').textContent == 'The session has ended.'")
