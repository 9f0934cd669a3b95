"""Tests of `reports/markdown.py`: cells of any text, and the spread by NumPy."""

import numpy as np
import pytest

from keras_mixer.reports.markdown import code, spread, table


def test_a_table_has_a_cell_for_each_column_whatever_its_text():
    assert table(["a", "b|c"], [(1, "x|y"), ("é", None)]) == [
        "| a | b\\|c |",
        "|---|---|",
        "| 1 | x\\|y |",
        "| é | None |",
    ]


@pytest.mark.parametrize(("text", "shown"), [("--a=1", "`--a=1`"), ("a`b", "`` a`b ``")])
def test_code_is_fenced_by_more_backticks_than_it_has(text, shown):
    assert code(text) == shown


def test_the_spread_is_that_of_a_sample():
    values = [71.19, 72.19, 72.21]
    assert spread(values) == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert spread([1.0]) == "1.00"
    assert spread([]) == "–"
