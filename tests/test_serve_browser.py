"""The studio page in a real Chromium, against a real server process with real workers."""

from __future__ import annotations

import re
import shutil
import struct
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")
pytest.importorskip("playwright.sync_api", reason="needs the extra browser")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from beavervision.evaluate.samples import portrait as sample_portrait
from beavervision.serve.access import add_key
from tests.test_serve import UPLOAD_MB, Server, started

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
PATIENCE_MS = 60_000
TEXT = "Hello there, how are you?"
LONG = "Papa moved away, and nobody ever asked him why he did so. " * 20
PHONE = {"width": 375, "height": 740}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = started(tmp_path_factory.mktemp("serve"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "a face.jpg"
    with sample_portrait() as sample, Image.open(sample) as picture:
        picture.convert("RGB").resize((256, 256)).save(path, "JPEG", quality=92)
    return path


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server as a new visitor. In the end nothing may have gone wrong in it, or come from elsewhere."""
    contexts, troubles, hosts = [], [], set()

    def open_page(server: Server, ready: bool = True, browser: Browser = browser, **how: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | how))
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "console", lambda m: troubles.append(m.text) if "Security Policy" in m.text or "Trusted" in m.text else None
        )
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"http://{server.address}/")
        if ready:
            expect(page.locator("#voice option").first).to_be_attached()
        hosts.discard("")  # of blobs
        assert hosts <= {server.address}
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
    assert len(hosts - {""}) <= 1


def filled(page: Page, face: Path, text: str = TEXT) -> None:
    page.set_input_files("#face-input", face)
    expect(page.locator("#face-about")).to_contain_text("256 × 256")
    page.fill("#text", text)
    page.check("#consent")


def made(page: Page) -> None:
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#result")).to_be_visible()


# --- the way from a face to a video -----------------------------------------------------------------------------------


def test_from_a_portrait_and_a_text_to_a_video(
    visit: Callable[..., Page], server: Server, face: Path, tmp_path: Path
) -> None:
    page = visit(server)
    filled(page, face)
    made(page)
    expect(page.locator("#announce")).to_contain_text("The video is done")
    expect(page.locator("#output")).to_be_focused()

    video = page.locator(".made video")
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.locator(".controls .seek")).not_to_have_value("0")
    first, later = video.evaluate(
        """async (v) => {
          const shown = () => new Promise((told) => v.requestVideoFrameCallback((_, { mediaTime }) => told(mediaTime)));
          return [await shown(), await shown()];
        }"""
    )
    assert later > first >= 0
    assert video.evaluate("v => [v.videoWidth, v.videoHeight]") == [256, 256]

    slider = page.get_by_role("slider", name="Source left, result right")
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "0 % source, 100 % result")
    assert page.locator(".layers").evaluate("e => e.style.getPropertyValue('--cut')") == "0%"
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "1 % source, 99 % result")
    page.get_by_label("Side by side").check()
    source, result = page.locator(".side.source").bounding_box(), page.locator(".side.made").bounding_box()
    assert source and result and source["x"] + source["width"] <= result["x"]
    page.get_by_role("radiogroup", name="Compare").get_by_label("Result").check()
    expect(page.locator(".side.source")).to_be_hidden()

    mouth, times = page.locator("#chart-mouth"), page.locator("#chart-stages")
    expect(mouth.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"opening reaches 0\.[0-9]+ mouth"))
    line = mouth.locator("path.opening").first.get_attribute("d") or ""
    assert len(line.split("L")) > 20
    assert times.locator("rect.bar-work").count() >= 6
    times.get_by_text("As a table").click()
    expect(times.get_by_role("row", name="Find the face")).to_be_visible()
    video.evaluate("v => v.pause()")
    mouth.get_by_role("img").click()  # in its middle
    middle_s = video.evaluate("v => [v.currentTime, v.duration]")
    assert abs(middle_s[0] - middle_s[1] / 2) < 0.15 * middle_s[1]

    with page.expect_download() as download:
        page.get_by_role("link", name="Download the video").click()
    download.value.save_as(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    assert re.fullmatch(r"[0-9a-f]{24}\.mp4", download.value.suggested_filename)
    with page.expect_download() as download:
        page.get_by_role("link", name="Report (JSON)").click()
    download.value.save_as(tmp_path / "a.json")
    assert '"series"' in (tmp_path / "a.json").read_text()

    # The address brings the result back; the source was this visit's.
    item = page.locator("#jobs li", has_text=TEXT)
    expect(item).to_contain_text("done")
    page.reload()
    expect(page.locator(".made video")).to_be_visible()
    expect(page.get_by_role("radiogroup", name="Compare")).to_be_hidden()
    page.locator("#jobs li", has_text=TEXT).get_by_role("button", name="Delete").click()
    expect(page.locator("#jobs li", has_text=TEXT)).to_have_count(0)
    expect(page.locator("#result")).to_be_hidden()
    assert server.get("/api/v1/jobs")["jobs"] == []

    # What was made is a video with a face: expressions are seen on it too, and it is played beside what is made of it.
    page.set_input_files("#face-input", tmp_path / "a.mp4")
    expect(page.locator("#presets img").last).to_be_visible()
    page.fill("#text", TEXT * 2)
    page.check("#consent")
    made(page)
    source = page.locator(".source video")
    video.evaluate("(v, t) => { v.currentTime = t; }", 2.0)
    expect(page.locator(".controls .seek")).to_have_value("2")
    length_s = source.evaluate("v => v.duration")  # it turns round at its end
    expect(page.locator(".controls .time")).to_contain_text("0:02")
    source.evaluate("v => v.seeking && new Promise((done) => v.addEventListener('seeked', done, { once: true }))")
    assert source.evaluate("v => v.currentTime") == pytest.approx(2 * length_s - 2.0, abs=0.1)


def test_with_the_keyboard_alone(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)

    page.on("filechooser", lambda chooser: chooser.set_files(face))

    def reach(selector: str) -> None:
        for _ in range(60):
            if page.locator(selector).evaluate("e => e === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached by Tab")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the form")).to_be_focused()
    page.keyboard.press("Enter")
    reach('input[name="face-from"][value="file"]')
    reach("#face-choose")
    page.keyboard.press("Enter")
    expect(page.locator("#face-about")).to_contain_text("256 × 256")
    reach("#text")
    page.keyboard.type(TEXT)
    reach("#speed")
    page.keyboard.press("End")
    expect(page.get_by_role("slider", name="Speed", exact=True)).to_have_attribute("aria-valuetext", "2.00 ×")
    expect(page.locator("#speed-out")).to_have_text("2.00 ×")
    reach("#consent")
    page.keyboard.press("Space")
    reach("#submit")
    page.keyboard.press("Enter")
    expect(page.locator("#result")).to_be_visible()
    reach(".cut")
    reach(".controls button:first-child")
    reach("#download")


def test_a_recording_and_a_dropped_face(visit: Callable[..., Page], server: Server, face: Path, tmp_path: Path) -> None:
    page = visit(server)
    with wave.open(str(tmp_path / "hm.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(b"".join(struct.pack("<h", (i * 37 % 8000) - 4000) for i in range(12_000)))
    content = list(face.read_bytes())
    transfer = page.evaluate_handle(
        """bytes => {
          const made = new DataTransfer();
          made.items.add(new File([new Uint8Array(bytes)], "dropped.jpg", { type: "image/jpeg" }));
          return made;
        }""",
        content,
    )
    page.dispatch_event("#face-drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#face-about")).to_contain_text("dropped.jpg")
    page.get_by_role("radio", name="Recording").check()
    page.set_input_files("#audio-input", tmp_path / "hm.wav")
    expect(page.locator("#audio-about")).to_contain_text("hm.wav")
    page.check("#consent")
    made(page)
    assert page.locator(".made video").evaluate("v => v.duration") == pytest.approx(0.75, abs=0.1)


def test_the_voice_is_heard_before_anything_is_made(visit: Callable[..., Page], server: Server) -> None:
    page = visit(server)
    page.fill("#text", "A few words to hear the voice, no more than that. ☃")
    with page.expect_response("**/api/v1/speech") as spoken:
        page.get_by_role("button", name="Hear the voice").click()
    assert spoken.value.status == 200
    expect(page.locator("#hear-note")).to_contain_text("☃")
    expect(page.get_by_role("button", name="Hear the voice")).to_be_visible()  # again, when it has ended


def test_a_job_is_cancelled(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    filled(page, face, LONG)
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#progress-what")).to_contain_text("Picture")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#view-note")).to_contain_text("Cancelled")
    expect(page.get_by_role("button", name="Make the video")).to_be_enabled()
    expect(page.locator("#jobs li").first).to_contain_text("cancelled")
    assert server.get("/api/v1/jobs")["jobs"][0]["state"] == "cancelled"


def test_a_stored_face_is_used_again(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    page.set_input_files("#face-input", face)
    page.fill("#avatar-name", "Eileen")
    page.get_by_role("button", name="Store").click()
    expect(page.locator("#face-error")).to_contain_text("confirm below")
    page.check("#consent")
    page.get_by_role("button", name="Store").click()
    expect(page.locator("#avatar")).to_be_focused()
    expect(page.locator("#avatar option")).to_have_text(["Eileen"])
    expect(page.locator("#view img")).to_be_visible()
    page.fill("#text", TEXT)
    made(page)
    page.get_by_role("button", name="Delete this face").click()
    expect(page.locator("#avatar-tab")).to_be_hidden()
    assert server.get("/api/v1/avatars") == []


def test_expressions_are_seen_on_the_face(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    page.set_input_files("#face-input", face)
    cards = page.locator("#presets img")
    expect(cards.last).to_be_visible()
    assert cards.count() >= 7
    page.get_by_label("Happy").check()
    expect(page.locator("#view-preview")).to_have_attribute("alt", "Preview: happy, 60 %")
    mild = page.locator("#view-preview").get_attribute("src")
    page.locator("#intensity").fill("1")
    expect(page.locator("#view-preview")).to_have_attribute("alt", "Preview: happy, 100 %")
    assert page.locator("#view-preview").get_attribute("src") != mild
    page.get_by_label("As it is").check()
    expect(page.locator("#view-preview")).to_have_count(0)
    expect(page.locator("#view-face")).to_be_visible()


def test_the_expression_goes_with_the_job(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    filled(page, face)
    page.get_by_label("Sad").check()
    page.locator("#intensity").fill("0.8")
    page.get_by_label("Follow the mood").check()
    page.evaluate(
        """() => {
          const append = FormData.prototype.append;
          FormData.prototype.append = function (name, value, ...more) {
            if (name === "settings") window.sent = JSON.parse(value);
            return append.call(this, name, value, ...more);
          };
        }"""
    )
    made(page)
    sent = page.evaluate("window.sent")
    assert (sent["expression"], sent["face"], sent["fit"]) == ("sad:0.8,auto", "largest", "loop")
    page.locator("#chart-stages").get_by_text("As a table").click()
    expect(page.get_by_role("row", name="Draw the expression")).to_be_visible()


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_beside_it(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    submit = page.get_by_role("button", name="Make the video")
    submit.click()
    expect(page.get_by_role("button", name="Choose a file").first).to_be_focused()
    for field in ("face", "text", "consent"):
        expect(page.locator(f"#{field}-error")).to_be_visible()
    page.set_input_files("#face-input", face)
    submit.click()
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#text")).to_have_attribute("aria-invalid", "true")
    page.fill("#text", TEXT)
    submit.click()
    expect(page.locator("#consent")).to_be_focused()
    expect(page.locator("#consent-error")).to_contain_text("Confirm that you have the right")
    page.check("#consent")
    expect(page.locator("#consent-error")).to_be_hidden()
    assert server.get("/api/v1/status")["queued"] == 0


def test_files_that_cannot_be_used(visit: Callable[..., Page], server: Server, tmp_path: Path) -> None:
    page = visit(server)
    (tmp_path / "notes.txt").write_text("no face")
    (tmp_path / "large.png").write_bytes(bytes((UPLOAD_MB << 20) + 1))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing more")
    for name, message in (("notes.txt", "is not a picture or video"), ("large.png", f"{UPLOAD_MB} MB are allowed")):
        page.set_input_files("#face-input", tmp_path / name)
        expect(page.locator("#face-error")).to_contain_text(message)
        expect(page.locator("#face-choose")).to_be_focused()
    page.get_by_role("radio", name="Recording").check()
    page.set_input_files("#audio-input", tmp_path / "notes.txt")
    expect(page.locator("#audio-error")).to_contain_text("is not a sound file")
    page.get_by_role("radio", name="Text").check()

    page.set_input_files("#face-input", tmp_path / "broken.png")
    expect(page.locator("#face-error")).to_be_hidden()
    page.fill("#text", TEXT)
    page.check("#consent")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#trouble")).to_contain_text("The file cannot be used")
    expect(page.locator("#face-error")).to_contain_text("The video")
    expect(page.locator("#face-choose")).to_be_focused()


def test_a_webcam_shot_without_a_face(visit: Callable[..., Page], server: Server) -> None:
    page = visit(server, permissions=["camera"])
    page.get_by_label("Webcam").check()
    page.get_by_role("button", name="Start the camera").click()
    shoot = page.get_by_role("button", name="Take the picture")
    expect(shoot).to_be_focused()
    shoot.click()
    expect(page.locator("#face-about")).to_contain_text("webcam.jpg")
    expect(page.locator("#camera-view")).to_be_hidden()
    page.fill("#text", TEXT)
    page.check("#consent")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#trouble")).to_contain_text("No face was found")
    expect(page.locator("#trouble-detail")).to_contain_text("Use a picture that shows a face from the front")
    expect(page.locator("#face-choose")).to_be_focused()


def test_a_webcam_that_is_refused(visit: Callable[..., Page], server: Server, browser: Browser) -> None:
    arguments = [a for a in ARGUMENTS if a != "--use-fake-ui-for-media-stream"] + ["--deny-permission-prompts"]
    refusing = browser.browser_type.launch(executable_path=CHROMIUM, args=arguments)
    page = visit(server, browser=refusing)
    page.get_by_label("Webcam").check()
    page.get_by_role("button", name="Start the camera").click()
    expect(page.locator("#face-error")).to_contain_text("The camera was refused. Allow it")
    expect(page.get_by_role("button", name="Start the camera")).to_be_focused()
    refusing.close()


def test_a_text_that_the_voice_cannot_say(visit: Callable[..., Page], server: Server, face: Path) -> None:
    page = visit(server)
    filled(page, face, "Добрый день, как поживаете?")
    page.get_by_role("button", name="Hear the voice").click()
    expect(page.locator("#text-error")).to_contain_text("cannot say the letters")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#trouble")).to_contain_text("The text cannot be spoken")
    expect(page.locator("#text")).to_be_focused()
    page.fill("#text", "x" * (len(LONG) * 2))
    expect(page.locator("#text-error")).to_contain_text("Shorten it")


def test_a_server_that_goes_away_and_comes_back(visit: Callable[..., Page], face: Path, tmp_path: Path) -> None:
    server = started(tmp_path)
    try:
        page = visit(server)
        filled(page, face, LONG[:170])
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#progress-what")).to_contain_text("Picture")
        server.kill()
        expect(page.locator("#trouble-detail")).to_contain_text("The job is safe")
        page.get_by_role("button", name="Look now").click()
        expect(page.locator("#trouble-detail")).to_contain_text("The job is safe")
        server = started(tmp_path, serve_port=server.address.split(":")[1])
        expect(page.locator("#result")).to_be_visible(timeout=2 * PATIENCE_MS)

        server.kill()
        page.fill("#text", "Hi.")
        page.get_by_role("button", name="Make the video").click()
        expect(page.locator("#trouble")).to_contain_text("The service does not answer")
        server = started(tmp_path, serve_port=server.address.split(":")[1])
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#result")).to_be_visible(timeout=2 * PATIENCE_MS)
        assert len(server.get("/api/v1/jobs")["jobs"]) == 2
    finally:
        server.kill()


def test_a_service_with_keys_asks_for_one(visit: Callable[..., Page], face: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    server = started(tmp_path)
    server.headers["Authorization"] = f"Bearer {key}"
    try:
        page = visit(server, ready=False)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#trouble")).to_contain_text("An API key is needed")
        page.get_by_role("button", name="Enter a key").click()
        dialog.get_by_label("Key", exact=True).fill("bv_wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-refused")).to_be_visible()
        dialog.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#voice option").first).to_be_attached()
        expect(page.locator("#trouble")).to_be_hidden()
        filled(page, face)
        made(page)
        assert page.locator(".made video").evaluate("v => v.duration") > 0.5
        page.reload()
        expect(page.locator(".made video")).to_be_visible()  # this tab knows the key
    finally:
        server.kill()


# --- for everybody ----------------------------------------------------------------------------------------------------


def violations(page: Page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser")
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]} {one['nodes'][0]['failureSummary']}" for one in found]


@pytest.mark.parametrize(("scheme", "phone"), [("light", False), ("dark", True)], ids=["light-desk", "dark-phone"])
def test_axe_finds_nothing(visit: Callable[..., Page], server: Server, face: Path, scheme: str, phone: bool) -> None:
    how = {"viewport": PHONE} if phone else {}
    page = visit(server, color_scheme=scheme, reduced_motion="reduce", **how)
    assert violations(page) == []
    page.get_by_role("button", name="Make the video").click()
    page.get_by_text("More options").click()
    assert violations(page) == []  # with errors
    filled(page, face, "Hi.")
    made(page)
    expect(page.locator("#chart-stages rect").first).to_be_visible()
    page.get_by_text("As a table").click()
    assert violations(page) == []
    page.evaluate("document.querySelector('#key-dialog').showModal()")
    assert violations(page) == []


@pytest.mark.parametrize("width", [375, 320])
def test_a_phone_shows_all_of_it(visit: Callable[..., Page], server: Server, face: Path, width: int) -> None:
    page = visit(server, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    page.get_by_text("More options").click()
    filled(page, face, "Hi.")
    made(page)
    expect(page.locator("#chart-stages rect").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rows = page.evaluate(
        """() => [...document.querySelectorAll("#jobs li")]
          .map((li) => new Set([...li.querySelectorAll("a, button")].map((e) => e.offsetTop)).size)"""
    )
    if width == 375:  # what can be done with a job stands in one line
        assert set(rows) == {1}
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, a.button, select, input:not([hidden])")]
          .map((e) => [e.id || e.textContent, e.getBoundingClientRect()])
          .filter(([, box]) => box.width > 0 && (box.height < 20 || box.width < 20)).map(([name]) => name)"""
    )
    assert small == []


def test_the_theme_is_the_systems_or_the_users(visit: Callable[..., Page], server: Server) -> None:
    page = visit(server, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light theme").click()
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    expect(page.get_by_role("button", name="Dark theme")).to_be_visible()
