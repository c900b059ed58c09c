"""What a spreadsheet makes of the tables that people take with them."""

import csv
import io

import pandas as pd

from estimator.show.csv_file import csv_of


def test_no_cell_of_a_csv_is_a_formula():
    wrong = ["=1+1", "+1", "-1", "@x", "\t=x", "\r=x", " =x", "fine", "a=b"]
    frame = pd.DataFrame({"text": wrong, "number": [-1.5] * len(wrong)}, index=wrong)
    rows = list(csv.reader(io.StringIO(csv_of(frame))))[1:]
    assert [row[0] for row in rows] == [row[1] for row in rows]
    assert all(row[1].strip()[0] not in "=+-@" for row in rows)
    assert [row[1].lstrip("'").strip() for row in rows] == [text.strip() for text in wrong]
    assert {row[2] for row in rows} == {"-1.5"}
