"""Which texts stay: literal cases of who goes first."""

from tlt_jax.specdec.texts import retention


def entry(text_id, length, version, num_bytes=10):
    return retention.Entry(text_id, version, length, 2, num_bytes, text_id)


def test_short_and_old_texts_go_first():
    old = [entry(1, 90, 3), entry(2, 80, 3), entry(3, 5, 4)]
    last = [entry(4, 40, 6), entry(5, 70, 6)]
    now = [entry(6, 9, 7), entry(7, 20, 7), entry(8, 20, 7)]
    left, order = [*now, *last, *old], []
    while left:
        order.append(retention.least_useful(left, left, 7))
        left.remove(order[-1])
    # 6: this step holds more bytes. 4: both hold the same, and the last one gives way.
    assert [e.text_id for e in order] == [2, 1, 3, 6, 4, 7, 5, 8]


def test_texts_at_work_cannot_make_way():
    there = [entry(1, 8, 2), entry(2, 20, 2)]
    there[0].pins = 1
    (victim,) = retention.victims_of(entry(3, 30, 2), there, 10, 2)
    assert victim.text_id == 2
    # Shorter than all that could go: it stays out itself.
    assert retention.victims_of(entry(4, 9, 2), there, 10, 2) is None
    assert retention.victims_of(entry(4, 9, 2), there, 0, 2) == []


def test_texts_go_until_there_is_room():
    there = [entry(i, 8 + i, 2) for i in range(4)]
    victims = retention.victims_of(entry(9, 30, 2), there, 25, 2)
    assert [v.text_id for v in victims] == [0, 1, 2]
