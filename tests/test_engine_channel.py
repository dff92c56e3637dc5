"""A channel between real threads: order, bounds, waking, merging."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from beavervision.engine.channel import Cancelled, Channel

_LIMIT_S = 10.0


class _Thread:
    """Runs a call in a thread; `result` joins and returns or raises."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> object:
        self._thread.join(_LIMIT_S)
        assert not self._thread.is_alive(), "nobody woke the thread"
        if self._error is not None:
            raise self._error
        return self._value


def _put_all(channel: Channel[int], count: int) -> None:
    for value in range(count):
        channel.put(value)
    channel.close()


def test_order_is_kept_and_the_bound_holds() -> None:
    level = peak = 0

    def count(change: int) -> None:  # under the channel's lock
        nonlocal level, peak
        level += change
        peak = max(peak, level)

    channel: Channel[int] = Channel(3, count=count)
    producer = _Thread(lambda: _put_all(channel, 1000))
    assert list(channel) == list(range(1000))
    producer.result()
    assert (level, len(channel)) == (0, 0)
    assert 1 <= peak <= 3


def test_get_at_the_end_and_with_a_timeout() -> None:
    channel: Channel[int] = Channel(1)
    with pytest.raises(TimeoutError):
        channel.get(timeout_s=0.001)
    channel.put(1)
    channel.close()
    with pytest.raises(ValueError, match="closed"):
        channel.put(2)
    assert channel.get() == 1
    with pytest.raises(EOFError):
        channel.get()


def test_error_comes_after_what_was_queued() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.close(OSError("disk"))
    channel.close()  # the first close counts
    assert channel.get() == 1
    with pytest.raises(OSError, match="disk"):
        channel.get()


def test_close_wakes_a_waiting_get() -> None:
    channel: Channel[int] = Channel(1)
    consumer = _Thread(lambda: list(channel))
    channel.close()
    assert consumer.result() == []


def test_cancel_wakes_a_waiting_get() -> None:
    channel: Channel[int] = Channel(1)
    consumer = _Thread(channel.get)
    channel.cancel()
    with pytest.raises(Cancelled):
        consumer.result()


def test_cancel_wakes_a_waiting_put_and_drops_the_queue() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(0)
    producer = _Thread(lambda: channel.put(1))
    channel.cancel()
    with pytest.raises(Cancelled):
        producer.result()
    assert len(channel) == 0
    with pytest.raises(Cancelled):
        channel.get()
    with pytest.raises(Cancelled):
        channel.put(2)


def test_cancelled_is_not_taken_for_an_error_of_a_library() -> None:
    assert not issubclass(Cancelled, Exception)


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Channel[int](0)


# A live item: the numbers of its pictures, and its sound.
Item = tuple[tuple[int, ...], str]


def _keep_sound(older: Item, newer: Item) -> Item:
    return newer[0], older[1] + newer[1]


def test_shedding_drops_old_pictures_and_no_sound() -> None:
    channel: Channel[Item] = Channel(2, _keep_sound)
    sound = "abcdefghij"
    merged = [channel.put(((n,), sound[n])) for n in range(10)]  # never waits
    assert merged == [0, 0] + [1] * 8
    assert len(channel) == 2
    channel.close()
    items = list(channel)
    assert "".join(s for _, s in items) == sound
    assert [pictures for pictures, _ in items] == [(8,), (9,)]


def test_shedding_passes_over_what_may_not_go() -> None:
    def merge(older: str, newer: str) -> str | None:
        return None if "!" in older + newer else newer

    channel: Channel[str] = Channel(3, merge)
    for item in ("a!", "b", "c"):
        channel.put(item)
    assert channel.put("d") == 1
    channel.close()
    assert list(channel) == ["a!", "c", "d"]


def test_shedding_waits_where_nothing_may_go() -> None:
    channel: Channel[int] = Channel(1, lambda older, newer: None)
    channel.put(1)
    producer = _Thread(lambda: channel.put(2))
    assert channel.get() == 1
    assert producer.result() == 0
    assert channel.get() == 2


def test_shedding_with_room_for_one() -> None:
    channel: Channel[int] = Channel(1, lambda older, newer: older + newer)
    assert [channel.put(n) for n in (1, 2, 3)] == [0, 1, 1]
    assert channel.get() == 6
