"""Strategies and tables: what can be built, how they are written, what is chosen."""

import pytest

from tlt_jax.specdec import strategy


@pytest.mark.parametrize(
    "text,nodes,longest",
    [
        ("D1K1V2", 1, 2),
        ("D3K2V4", 2 + 2 * 4, 4),
        ("D2K8V64", 8 + 64, 3),
        ("D4K2V5-ngram", 2 * 4, 5),
        ("D3K2V9-both", 2 + 2 * 4 + 2 * 3, 4),
        ("D3K2V4N24", 2 + 2 * 4, 4),
        ("D4K2V5N9-ngram", 2 * 4, 5),
    ],
)
def test_text_form_and_sizes(text, nodes, longest):
    made = strategy.parse(text)
    assert str(made) == text
    assert made.num_candidates == nodes
    assert made.max_accept_length == longest
    assert made.drafts == (made.proposer != "ngram")
    assert made.matches == (made.proposer != "drafter")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            (1, 8, 48),
            "tokens_to_verify=48 exceeds the tree's 9 nodes (draft_depth=1, topk=8): "
            "lower it or draft deeper.",
        ),
        ((4, 2, 4), "cannot hold a path of draft_depth=4"),
        ((0, 2, 4), "draft_depth=0: at least 1"),
        ((2, 0, 4), "topk=0: at least 1"),
        ((2, 2, 4, "ngram", -1), "budget=-1: nodes of all rows, at most 65536"),
        ((2, 2, 4, "oracle"), "proposer='oracle': use one of drafter, ngram, both"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        strategy.Strategy(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "D2", "D2K2", "K2D2V3", "D2K2V3-drafter-x", "2:3", "D2K2V3N", "D2K2V3N0"],
)
def test_malformed_text_is_refused(text):
    with pytest.raises(ValueError, match="D<draft_depth>K<topk>|proposer="):
        strategy.parse(text)


def test_a_budget_is_one_node_a_row_at_least_and_no_more_than_all():
    made, whole = strategy.parse("D3K2V4N24"), strategy.parse("D3K2V4")
    rows = (1, 6, 7, 24, 25)
    assert [made.num_columns(n) for n in rows] == [4, 24, 24, 24, 25]
    assert [made.shares(n) for n in rows] == [False, False, True, True, True]
    assert [made.of_batch(n) for n in (6, 7)] == [whole, made]
    assert [whole.num_columns(n) for n in rows] == [4, 24, 28, 96, 100]


def test_a_table_chooses_by_rows():
    table = strategy.parse_arms(("1:D4K1V5", "4:D2K1V3"))
    chosen = [str(table.first(n)) for n in range(1, 7)]
    assert chosen == ["D4K1V5", *["D2K1V3"] * 3, "None", "None"]
    assert strategy.parse_arms(()).first(1) is None


@pytest.mark.parametrize(
    "entries,message",
    [
        (("D4K1V5",), "is not <largest number of rows>:<strategy>"),
        (("x:D4K1V5",), "is not <largest number of rows>:<strategy>"),
        (("4:D4K1V5", "2:D2K1V3"), "the smallest first"),
        (("4:D4K1V5", "4:D2K1V3"), "the smallest first"),
        (("0:D4K1V5",), "at least 1"),
        (("4:D4K1V5", "16:D4K1V5N16"), "16 nodes for up to 16 rows.*Give more"),
    ],
)
def test_malformed_tables_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        strategy.parse_arms(entries)
