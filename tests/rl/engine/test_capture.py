"""Texts read from pages: which columns they are made of, and which are chosen.

That the features are those of a forward, `tests.rl.workers.test_workers` shows.
"""

import threading

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.engine import capture, scheduler

KEY = np.array([1, 2], np.uint32)


def row_of(num_prompt, tokens, length, request_id=77):
    prompt = np.arange(10, 10 + num_prompt, dtype=np.int32)
    request = types.Request(request_id, 5, 0, prompt, 9)
    # It holds pages for what the next call might have written, too.
    return scheduler.Row(request, list(tokens), pages=[7, 3, 9, 4, 8], length=length)


def made_of(row, num_features, size, num_fused=0):
    """The record of a row; feature f of position t is 10 t + f."""
    known = capture.known_pages(row, size)
    position = np.arange(len(known) * size).reshape(len(known), size, 1)
    columns = 10 * position + np.arange(num_features)
    text = capture.Finished.of(row, num_fused=num_fused, key=KEY, version=6)
    return capture.record(text, list(columns.astype(np.float32)))


@pytest.mark.parametrize("num_fused", [0, 2])
def test_a_text_has_its_pages_columns_and_zeros_for_its_last_token(num_fused):
    made = made_of(row_of(3, [20, 21], length=4), 3, 3, num_fused)
    assert made.tokens.tolist() == [10, 11, 12, 20, 21]
    assert (made.text_id, made.response_start, made.version) == (77, 3, 6)
    assert made.key is KEY
    known = [[10 * t + f for f in range(3)] for t in range(4)] + [[0, 0, 0]]
    assert made.hidden.tolist() == [column[num_fused:] for column in known]
    if num_fused:
        assert made.features.tolist() == [column[:2] for column in known]
    else:
        assert made.features is None


def test_a_text_cut_by_a_stop_string_has_no_column_behind_it():
    # Seven positions were cached before the text was cut to five tokens.
    made = made_of(row_of(3, [20, 21], length=7), 1, 3)
    assert made.hidden[:, 0].tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("length", "size", "known"),
    [(4, 3, [7, 3]), (7, 3, [7, 3]), (3, 3, [7]), (4, 1, [7, 3, 9, 4]), (1, 8, [7])],
)
def test_pages_beyond_the_text_are_not_read(length, size, known):
    """Not what a row holds besides, nor what was cut off behind a stop string."""
    assert capture.known_pages(row_of(3, [20, 21], length), size) == known


class Page:
    """Stands for a page on a device, which comes when it may."""

    nbytes = 24

    def __init__(self, may_come=None):
        self.may_come = may_come or threading.Event()
        self.is_asked_for = False
        if may_come is None:
            self.may_come.set()

    def copy_to_host_async(self):
        self.is_asked_for = True

    def __array__(self, dtype=None, copy=None):
        assert self.is_asked_for and self.may_come.wait(20)
        return np.ones((3, 2), np.float32)


def finished(number):
    row = row_of(3, [20], 3, number)
    return capture.Finished.of(row, num_fused=0, key=KEY, version=0)


def test_nobody_waits_for_texts_and_their_order_stays():
    told, may_come = [], threading.Event()
    with capture.Delivery(lambda text: told.append(text.text_id)) as delivery:
        # The first text comes when all have been added.
        delivery.add(finished(5), [Page(may_come)])
        for number in (3, 8):
            delivery.add(finished(number), [Page()])
        assert told == []
        may_come.set()
    assert told == [5, 3, 8]


def test_only_so_much_is_underway(monkeypatch):
    """Pages of texts that wait fill the device: above a bound the oldest is awaited."""
    monkeypatch.setattr(capture, "MOST_UNDERWAY_BYTES", 2 * Page.nbytes)
    told, may_come = [], threading.Event()
    with capture.Delivery(lambda text: told.append(text.text_id)) as delivery:
        delivery.add(finished(1), [Page(may_come)])
        delivery.add(finished(2), [Page(may_come)])
        threading.Timer(0.05, may_come.set).start()
        assert told == []
        delivery.add(finished(3), [Page()])
        assert told[:1] == [1]
    assert told == [1, 2, 3]


def test_an_error_of_handing_on_ends_the_run_and_what_comes_behind_it():
    told, may_come = [], threading.Event()

    def hand_on(text):
        told.append(text.text_id)
        if text.text_id == 2:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        with capture.Delivery(hand_on) as delivery:
            for number in (1, 2, 3, 4):
                delivery.add(finished(number), [Page(may_come)])
            may_come.set()
    assert told == [1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("capture")]
    # The next one to be added is told.
    with pytest.raises(OSError, match="the disk is full"):
        with capture.Delivery(hand_on) as delivery:
            delivery.add(finished(2), [Page()])
            delivery._underway[0][0].exception()
            delivery.add(finished(3), [Page()])
            told.append("not reached")
    assert told == [1, 2, 2]


def test_the_same_share_is_chosen_always():
    chosen = [i for i in range(1000) if capture.is_chosen(i, 0.25)]
    assert len(chosen) == 251
    assert chosen[:6] == [0, 2, 5, 10, 13, 18]
    assert all(capture.is_chosen(i, 0.5) for i in chosen)
    assert all(capture.is_chosen(i, 1.0) for i in range(100))
    assert not any(capture.is_chosen(i, 0.0) for i in range(100))
