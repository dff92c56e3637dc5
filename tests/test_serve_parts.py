"""Parts of the service on their own: the look at hostile media, storage, keys and links, cleaning up, leases."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision import metrics
from beavervision.errors import MediaError, NoAudioError, UsageError
from beavervision.serve import access, worker
from beavervision.serve import guard as guard_module
from beavervision.serve.access import KeyRing, Keys, Links, add_key, is_loopback, secret
from beavervision.serve.guard import Guard, Limits
from beavervision.serve.jobs import Job, NewJob, State, new_id
from beavervision.serve.place import Place, Task
from beavervision.serve.problems import without_folders
from beavervision.serve.storage import LocalStorage
from beavervision.serve.supervisor import Supervisor
from beavervision.settings import Settings
from tests.answers import until
from tests.media_factory import beeps, make_sound, make_video

LIMITS = Limits(side_px=200, seconds=10)


# --- hostile media ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    made = Guard()
    yield made
    made.close()


def test_ordinary_media_pass(tmp_path: Path, guard: Guard) -> None:
    video = make_video(tmp_path / "a.mp4", pictures=3)
    sound = make_sound(tmp_path / "a.wav", beeps(8000, 8000, [Fraction(0)]), 8000)
    guard.examine(video, sound, LIMITS)


def test_ten_hours_in_few_pictures_are_refused(tmp_path: Path, guard: Guard) -> None:
    video = make_video(tmp_path / "a.mp4", pictures=41, times=[Fraction(900 * i) for i in range(41)])
    with pytest.raises(MediaError, match=r"The video is 3\d{4} s long; 10 s are allowed"):
        guard.examine(video, None, LIMITS)


def test_a_rate_that_no_camera_has_is_refused(tmp_path: Path, guard: Guard) -> None:
    video = make_video(tmp_path / "a.mp4", pictures=20, rate=Fraction(1000))
    with pytest.raises(MediaError, match="1000 pictures a second; 240 are allowed"):
        guard.examine(video, None, LIMITS)


def test_a_bomb_of_a_picture_is_refused(tmp_path: Path, guard: Guard) -> None:
    bomb = tmp_path / "a.png"
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    )
    with pytest.raises(MediaError, match="pixels"):
        guard.examine(bomb, None, LIMITS)


def test_what_is_larger_or_longer_than_allowed_is_refused(tmp_path: Path, guard: Guard) -> None:
    wide = make_video(tmp_path / "a.mp4", pictures=2, size=(256, 96))
    with pytest.raises(MediaError, match=r"256x96 pixels; a side may have 200"):
        guard.examine(wide, None, LIMITS)
    long = make_sound(tmp_path / "a.wav", np.zeros((1, 8000 * 11), np.float32), 8000)
    with pytest.raises(MediaError, match="The audio is 11 s long"):
        guard.examine(None, long, LIMITS)
    with pytest.raises(NoAudioError, match="The audio has no sound"):
        guard.examine(None, make_video(tmp_path / "b.mp4", pictures=2), LIMITS)


def test_the_child_has_limits() -> None:
    code = (
        "from beavervision.serve import guard; import resource; guard.limit(guard._MEMORY_BYTES, guard._CPU_S)\n"
        "print(resource.getrlimit(resource.RLIMIT_CPU)[1])\n"
        "try:\n    bytearray(guard._MEMORY_BYTES)\nexcept MemoryError:\n    print('refused')\n"
        "try:\n    open('/tmp/guard_writes', 'wb', 0).write(b'x')\nexcept OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["20", "refused", "27"]
    Path("/tmp/guard_writes").unlink()


def test_a_child_that_dies_refuses_the_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_COMMAND", ["/bin/false"])
    dead = Guard()
    with pytest.raises(MediaError, match="within the limits"):
        dead.examine(tmp_path / "a.mp4", None, LIMITS)
    dead.close()


def test_looks_share_a_process_that_is_started_again_when_it_is_killed(tmp_path: Path, guard: Guard) -> None:
    video = make_video(tmp_path / "a.mp4", pictures=3)
    guard.examine(video, None, LIMITS)
    first = guard._process
    assert first is not None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: guard.examine(video, None, LIMITS), range(8)))
    assert guard._process is first
    first.send_signal(signal.SIGKILL)
    first.wait()
    guard.examine(video, None, LIMITS)
    assert guard._process is not first


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_that_waits_may_die_and_ends_with_the_guard(tmp_path: Path) -> None:
    def waiting() -> list[int]:
        assert made._process is not None
        pid = made._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    made, video = Guard(), make_video(tmp_path / "a.mp4", pictures=3)
    try:
        made.examine(video, None, LIMITS)
        until(lambda: len(waiting()) == 1)
        os.kill(waiting()[0], signal.SIGKILL)
        made.examine(video, None, LIMITS)
        until(lambda: len(waiting()) == 1)
        (last,) = waiting()
    finally:
        made.close()
    until(lambda: not Path(f"/proc/{last}").exists())


def test_a_look_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import time; from beavervision.serve import guard\n"
        "guard._WALL_S = 1; guard._look = lambda task: time.sleep(600 * (task['side_px'] == 200)); guard._main()"
    )
    monkeypatch.setattr(guard_module, "_COMMAND", [sys.executable, "-c", code])
    slow = Guard()
    with pytest.raises(MediaError, match="within the limits"):
        slow.examine(tmp_path / "a.mp4", None, LIMITS)
    slow.close()


# --- storage, keys, links ---------------------------------------------------------------------------------------------


def test_storage_keeps_what_it_is_given_and_nothing_outside(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root")
    for key in ("j1/in/video", "j1/out/a.mp4", "j2/in/video"):
        (tmp_path / "new").write_text(key)
        storage.put(tmp_path / "new", key)
    assert storage.fetch("j1/out/a.mp4").read_text() == "j1/out/a.mp4"
    assert sorted(name for name, _ in storage.groups()) == ["j1", "j2"]
    storage.remove("j1/in")
    with pytest.raises(FileNotFoundError):
        storage.fetch("j1/in/video")
    storage.remove("j1/out/a.mp4")
    storage.remove("j2")
    storage.remove("none")
    assert list(storage.groups()) == []
    for key in ("../a", "/etc/passwd", "a/../b", "", "a/b/c/d", "a/.b"):
        with pytest.raises(ValueError, match="no key"):
            storage.fetch(key)


def test_keys_are_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "ann")
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert Keys.load(path).owner(key) == "ann"
    assert Keys.load(path).owner(key[:-1]) is None
    with pytest.raises(UsageError, match="already"):
        add_key(path, "ann")
    with pytest.raises(UsageError, match="no name"):
        add_key(path, "a b")
    path.write_text("ann secret\n")
    with pytest.raises(UsageError, match="line 1"):
        Keys.load(path)


def test_a_key_is_added_to_a_last_line_that_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ann = add_key(path, "ann")
    path.write_text(path.read_text().strip())
    bob = add_key(path, "bob")
    keys = Keys.load(path)
    assert (keys.owner(ann), keys.owner(bob)) == ("ann", "bob")


def test_keys_of_a_running_service_follow_their_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(UsageError, match="cannot be read"):
        KeyRing(path, required=True)
    ring = KeyRing(path, required=False)

    def owner(key: str) -> str | None:
        assert ring.keys is not None
        return ring.keys.owner(key)

    assert ring.keys is None
    ann = add_key(path, "ann")
    assert owner(ann) == "ann"
    bob = add_key(path, "bob")
    assert (owner(ann), owner(bob)) == ("ann", "bob")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[1])
    assert (owner(ann), owner(bob)) == (None, "bob")
    path.write_text("no key\n")  # half written, say
    assert owner(bob) == "bob"
    path.unlink()
    assert owner(bob) is None


def test_a_key_file_that_cannot_be_read_for_a_moment_counts_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    ann = add_key(path, "ann")
    ring = KeyRing(path, required=True)
    path.write_text("")  # ann's key is withdrawn
    with monkeypatch.context() as full:

        def no_more_files(*_: object, **__: object) -> str:
            raise OSError(errno.EMFILE, "too many open files")

        full.setattr(Path, "read_text", no_more_files)
        for _ in range(3):
            assert ring.keys is not None and ring.keys.owner(ann) == "ann"
    assert len(caplog.records) == 1
    assert ring.keys is not None and ring.keys.owner(ann) is None


def test_keys_that_change_between_two_threads_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    ann = add_key(path, "ann")
    ring = KeyRing(path, required=True)
    add_key(path, "bob")
    load, has_read, goes_on = Keys.load, threading.Event(), threading.Event()

    def loaded(path: Path) -> Keys:
        keys = load(path)
        if threading.current_thread() is slow:
            has_read.set()
            assert goes_on.wait(60)
        return keys

    def told(*_: object) -> None:
        if threading.current_thread() is not slow:
            goes_on.set()
            slow.join()

    monkeypatch.setattr(Keys, "load", loaded)
    monkeypatch.setattr(access._LOG, "info", told)
    slow = threading.Thread(target=lambda: ring.keys)
    slow.start()
    assert has_read.wait(60)
    path.write_text("")  # all keys are withdrawn
    for _ in range(2):
        assert ring.keys is not None
    assert ring.keys.owner(ann) is None


def test_a_key_file_is_read_again_though_it_looks_as_old_as_before(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ann, before = add_key(path, "ann"), path.stat()
    ring = KeyRing(path, required=True)
    time.sleep(0.02)  # more than the grain of the file system's clock
    path.write_text(path.read_text().replace("ann", "bob"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ring.keys is not None and ring.keys.owner(ann) == "bob"


def test_the_secret_is_made_once_and_links_depend_on_it(tmp_path: Path) -> None:
    settings = Settings(serve_folder=tmp_path)
    links = Links(secret(settings), 60)
    assert secret(settings) == links.secret
    query = dict(part.split("=") for part in links.sign("/a")[0].split("&"))
    expires_s, signature = int(query["expires"]), query["signature"]
    assert links.holds("/a", expires_s, signature)
    assert not links.holds("/b", expires_s, signature)
    assert not links.holds("/a", expires_s + 1, signature)
    assert not Links(b"other", 60).holds("/a", expires_s, signature)
    assert not links.holds("/a", expires_s, "é")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False), ("a.b", False)],
)
def test_what_is_this_machine(host: str, local: bool) -> None:
    assert is_loopback(host) is local


# --- cleaning up, and leases ------------------------------------------------------------------------------------------


def test_what_is_past_its_time_or_belongs_to_nobody_is_removed(tmp_path: Path) -> None:
    settings = Settings(serve_folder=tmp_path, serve_keep_hours=1)
    place = Place.open(settings)
    supervisor = Supervisor(settings, place)

    def put(key: str) -> None:
        (tmp_path / "new").write_text("x")
        place.storage.put(tmp_path / "new", key)

    ids = {}
    for name in ("done", "failed", "waiting"):
        ids[name], _ = place.table.add(NewJob(new_id(), "me", {}, "f"), 10)
        put(f"{ids[name].id}/in/video")
        if name != "waiting":
            job = place.table.take("w")
            assert job is not None
            put(f"{job.id}/out/a.mp4")
            if name == "done":
                place.table.succeed(job, {}, f"{job.id}/out/a.mp4", 1.0, 25)
            else:
                place.table.fail(job, "media", "bad")
    put("nobody/in/video")
    put("fresh/in/video")
    os.utime(tmp_path / "files" / "nobody", (0, 0))

    supervisor.sweep()
    left = sorted(str(p.relative_to(tmp_path / "files")) for p in (tmp_path / "files").rglob("*") if p.is_file())
    assert left == sorted([f"{ids['done'].id}/out/a.mp4", f"{ids['waiting'].id}/in/video", "fresh/in/video"])

    later = Supervisor(Settings(serve_folder=tmp_path, serve_keep_hours=1e-9), place)
    later.sweep()
    assert place.table.get(ids["done"].id) is None
    waiting = place.table.get(ids["waiting"].id)
    assert waiting is not None
    assert waiting.state is State.QUEUED
    assert not (tmp_path / "files" / ids["done"].id).exists()
    events = [json.loads(line)["event"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert events == ["expired", "expired"]
    place.table.close()


@pytest.mark.parametrize("why", ["too long", "not mine", "abandoned", "database"])
def test_a_lease_that_ends_cancels_the_work(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    from sqlalchemy.exc import OperationalError

    def beat(*_: Any) -> bool:
        if why == "database":
            raise OperationalError("", None, Exception("locked"))
        return why != "not mine"

    monkeypatch.setattr(worker, "_BEAT_S", 0.01)
    settings = Settings(serve_job_limit_s=0.05 if why == "too long" else 60, serve_lease_s=0.05)
    abandon = threading.Event()
    if why == "abandoned":
        abandon.set()
    place: Any = SimpleNamespace(table=SimpleNamespace(beat=beat))
    job: Any = SimpleNamespace(id="j", spec=Job)
    lease = worker._Lease(place, job, settings, abandon, lambda: None)
    with lease.kept():
        assert lease.cancel.wait(20)
    assert lease.too_long is (why == "too long")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("{}/files/ab/in/video: no face was found. Look at {}/x.", "The video: no face was found. Look at /x."),
        ("{}/scratch/request-a1/speech.wav cannot be written.", "The speech cannot be written."),
    ],
)
def test_messages_do_not_tell_this_machines_folders(tmp_path: Path, message: str, told: str) -> None:
    assert without_folders(message.replace("{}", str(tmp_path)), tmp_path) == told


def test_a_job_that_kills_its_workers_is_counted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(serve_folder=tmp_path, serve_attempts=1)
    one = worker.Worker(Task(settings, "worker-0-a", "worker-0"))
    monkeypatch.setattr(worker, "_say", lambda job: None)  # standard output is the tests' own
    table, storage = one._place.table, one._place.storage
    job, _ = table.add(NewJob(new_id(), "me", {}, "f"), 10)
    (tmp_path / "new").write_text("x")
    storage.put(tmp_path / "new", f"{job.id}/in/video")
    assert table.take("dead") is not None
    table.release("dead")
    before = metrics.JOBS.labels("failed")._value.get()
    assert table.take("worker-0-a", one._lost) is None
    assert metrics.JOBS.labels("failed")._value.get() == before + 1
    (event,) = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (event["event"], event["job"], event["state"], event["attempts"]) == ("ended", job.id, "failed", 1)
    assert list(storage.groups()) == []
    table.close()


def test_the_step_of_a_job_is_told_with_its_beats() -> None:
    beats: list[Any] = []
    told = threading.Event()

    def beat(*facts: Any) -> bool:
        beats.append(facts[-1])
        told.set()
        return True

    place: Any = SimpleNamespace(table=SimpleNamespace(beat=beat))
    lease = worker._Lease(place, SimpleNamespace(id="j"), Settings(), threading.Event(), lambda: None)  # type: ignore[arg-type]
    lease.step("loading")
    lease.step("looking")
    lease.step("looking")
    with lease.kept():
        assert told.wait(20)
        lease.told(8, 25)
        lease.told(16, 25)
        told.clear()
        assert told.wait(20)
    assert beats[0] == "looking"
    assert beats[-1] == "drawing"
    assert [name for name, _ in lease.steps] == ["loading", "looking", "drawing"]
