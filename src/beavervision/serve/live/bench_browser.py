"""A viewer in a real Chromium: when it heard and showed what a live session said, and how far flashes and beeps are apart."""

from __future__ import annotations

import asyncio
import base64
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from beavervision.errors import UsageError
from beavervision.media import Picture
from beavervision.serve.live.room import Room

if TYPE_CHECKING:
    from playwright.async_api import Page

_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
_KEPT = 32  # pictures
_POLL_S = 0.05
_CONNECT_S = 30.0  # until the first pictures
BETWEEN_S = 0.2  # two flashes or two beeps, at least
_TAP_S = 0.02  # by which Chromium hands sound to what listens later than to the speakers (docs/live.md says how it was measured)

# `look(n)` begins to note: when sound was heard first, and the luma of the pictures until `n` after that, each with the time at
# which it is to be seen; the first of them and the last are kept. They are copied as they were decoded: drawing them on a canvas
# and reading that back takes so long that sound and pictures come late. `marks`, unless null, gets when white pictures are to be
# seen, and when tones leave the device, for which Chromium lets the pictures wait. Times are those of performance.now(), in ms.
_PAGE = """async ({ sync, kept, betweenMs, tapS }) => {
  const video = document.body.appendChild(document.createElement("video"));
  video.autoplay = true;
  const pc = (window.pc = new RTCPeerConnection());
  const stream = new MediaStream();
  pc.ontrack = ({ track }) => stream.addTrack(track);
  (await import(sync)).keepInStep(pc); // as the live page does
  for (const kind of ["video", "audio"]) pc.addTransceiver(kind, { direction: "recvonly" });
  await pc.setLocalDescription(await pc.createOffer());
  while (pc.iceGatheringState !== "complete") await new Promise((go) => setTimeout(go, 20));

  window.look = (after) => { window.seen = { heard: null, pictures: [], after }; };
  window.look(0);
  window.marks = null;
  const mark = (list, at) => { if (!list.length || at - list.at(-1) > betweenMs) list.push(at); };
  const thumbnail = new OffscreenCanvas(8, 8).getContext("2d", { willReadFrequently: true });
  const luma = async (frame) => {
    const { width, height } = frame.visibleRect;
    const planes = new Uint8Array(frame.allocationSize());
    await frame.copyTo(planes);
    frame.close();
    return [planes.subarray(0, width * height), width];
  };
  const shown = (now, { expectedDisplayTime }) => {
    video.requestVideoFrameCallback(shown);
    const seen = window.seen;
    if (window.marks) {
      thumbnail.drawImage(video, 0, 0, 8, 8);
      const light = thumbnail.getImageData(0, 0, 8, 8).data.reduce((sum, v, i) => sum + v * [77, 150, 29, 0][i % 4], 0);
      if (light / 256 / 64 > 200) mark(window.marks.flashes, expectedDisplayTime);
    }
    if (seen.heard === null || seen.after > 0) {
      seen.pictures.push([expectedDisplayTime, luma(new VideoFrame(video, { timestamp: 0 }))]);
      if (seen.pictures.length > kept) seen.pictures.splice(1, 1);
      if (seen.heard !== null) seen.after -= 1;
    }
  };
  video.requestVideoFrameCallback(shown);

  const listen = async (each) => {
    const context = new AudioContext();
    const meter = new AnalyserNode(context, { fftSize: 256 });
    context.createMediaStreamSource(video.srcObject).connect(meter);
    await context.resume();
    const wave = new Float32Array(256);
    const timer = setInterval(() => {
      meter.getFloatTimeDomainData(wave);
      each(wave, performance.now(), context);
    }, 4);
    return () => { clearInterval(timer); context.close(); };
  };
  window.listen = async () => {
    await listen((wave, now) => {
      if (Math.sqrt(wave.reduce((sum, v) => sum + v * v, 0) / wave.length) > 0.01) window.seen.heard ??= now;
    });
  };
  window.mark = async () => {
    const marks = (window.marks = { flashes: [], beeps: [] });
    marks.end = await listen((wave, now, { sampleRate, outputLatency }) => {
      const tone = wave.findIndex((v) => Math.abs(v) > 0.2);
      if (tone >= 0) mark(marks.beeps, now + 1000 * (outputLatency - (wave.length - tone) / sampleRate - tapS));
    });
  };
  window.marked = () => {
    const { flashes, beeps, end } = window.marks;
    window.marks = null;
    end();
    return { flashes, beeps };
  };
  window.play = async (sdp) => {
    await pc.setRemoteDescription({ type: "answer", sdp });
    video.srcObject = stream;
  };
  window.told = async (number) => {
    const [values, width] = await window.seen.pictures[number][1];
    let text = "";
    for (let i = 0; i < values.length; i += 8192) text += String.fromCharCode(...values.subarray(i, i + 8192));
    return [btoa(text), width];
  };
  return pc.localDescription.sdp;
}"""


@dataclass(frozen=True, slots=True)
class Shown:
    """When the browser heard something, and when it showed which pictures; times on this process's monotonic clock."""

    heard_s: float
    shown_s: tuple[float, ...]
    page: Page

    async def pictures(self) -> AsyncIterator[tuple[float, Picture]]:
        """Each is fetched when it is asked for: all at once would keep the session's event loop from its work."""
        for number, at_s in enumerate(self.shown_s):
            text, width = await self.page.evaluate("(number) => window.told(number)", number)
            yield at_s, _of_luma(text, width)


class BrowserViewer:
    def __init__(self, page: Page) -> None:
        self._page = page

    async def look(self, after: int) -> None:
        """Note what comes from now on, until `after` pictures after the first sound; returns when the first picture is there."""
        await self._page.evaluate("(after) => window.look(after)", after)
        while not await self._page.evaluate("window.seen.pictures.length"):
            await asyncio.sleep(_POLL_S)

    async def shown(self) -> Shown:
        """What was noted, once it is complete; good until the next :meth:`look`."""
        while not await self._page.evaluate("window.seen.heard !== null && window.seen.after <= 0"):
            await asyncio.sleep(_POLL_S)
        ahead_s = await self._ahead_s()
        heard_ms, shown_ms = await self._page.evaluate("[window.seen.heard, window.seen.pictures.map(([at]) => at)]")
        return Shown(heard_ms / 1e3 + ahead_s, tuple(at_ms / 1e3 + ahead_s for at_ms in shown_ms), self._page)

    async def marks(self, count: int) -> tuple[list[float], list[float]]:
        """When the next `count` white pictures, or more, are seen, and when tones begin meanwhile: seconds of the page's clock."""
        await self._page.evaluate("window.mark()")
        while await self._page.evaluate("Math.min(window.marks.flashes.length, window.marks.beeps.length)") < count:
            await asyncio.sleep(_POLL_S)
        told = await self._page.evaluate("window.marked()")
        return [at_ms / 1e3 for at_ms in told["flashes"]], [at_ms / 1e3 for at_ms in told["beeps"]]

    async def _ahead_s(self) -> float:
        """How far this process's clock is ahead of the page's, by the fastest of some questions."""
        asked: list[tuple[float, float]] = []
        for _ in range(10):
            began_s = time.monotonic()
            now_ms = await self._page.evaluate("performance.now()")
            ended_s = time.monotonic()
            asked.append((ended_s - began_s, (began_s + ended_s) / 2 - now_ms / 1e3))
        return min(asked)[1]


@asynccontextmanager
async def browser_viewer(room: Room) -> AsyncIterator[BrowserViewer]:
    """A Chromium that watches `room` by WebRTC on loopback.

    Raises:
        UsageError: the extra browser or a Chromium is missing.
        TimeoutError: no picture comes.
    """
    try:
        from playwright.async_api import Error, async_playwright
    except ModuleNotFoundError as error:
        raise UsageError("A browser is driven by playwright: pip install 'beavervision[browser]'.") from error
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    async with async_playwright() as driver:
        try:
            browser = await driver.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        except Error as error:
            raise UsageError(f"No Chromium starts ({error.message.splitlines()[0]}). Install chromium.") from error
        try:
            page = await browser.new_page()
            sync = files("beavervision") / "serve" / "web" / "live-sync.js"
            module = "data:text/javascript;base64," + base64.b64encode(sync.read_bytes()).decode()
            given = {"sync": module, "kept": _KEPT, "betweenMs": 1e3 * BETWEEN_S, "tapS": _TAP_S}
            _, answer = await room.play(await page.evaluate(_PAGE, given), loopback=True)
            await page.evaluate("(sdp) => window.play(sdp)", answer)
            async with asyncio.timeout(_CONNECT_S):
                while await page.evaluate("window.seen.pictures.length") < 2:
                    await asyncio.sleep(_POLL_S)
            await page.evaluate("window.listen()")
            yield BrowserViewer(page)
        finally:
            await browser.close()


def _of_luma(text: str, width: int) -> Picture:
    y = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, width)
    neutral = np.full((y.shape[0] // 2, width // 2), 128, np.uint8)
    return Picture(y, neutral, neutral)
