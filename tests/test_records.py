"""Tables of rows: what was damaged is counted and left out, what is good stays, and nothing else is appended to."""

from pathlib import Path

import pytest

from timm_vix._checks import InputError
from timm_vix._records import (
    LaterText,
    add_later_columns,
    append_record,
    check_writable,
    earlier_columns,
    header_of,
    read_records,
)
from timm_vix.benchmark import compare, cost

TABLE = dict(name=str, count=int, value=float)
RESULTS = Path(__file__).parents[1] / "examples" / "results"


def test_rows_come_back_as_they_were(tmp_path) -> None:
    path = tmp_path / "new" / "table.csv"
    rows = [dict(name='a, "quoted" name', count=1, value=0.5), dict(name="ü", count=None, value=None)]
    for row in rows:
        append_record(path, TABLE, row)
    assert read_records(path, TABLE, exact=True) == (rows, 0)
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as a spreadsheet saves it
    assert header_of(path) == list(TABLE)
    assert read_records(path, TABLE) == (rows, 0)


def test_a_table_of_an_earlier_version_gets_the_column_that_it_lacks(tmp_path) -> None:
    path, columns = tmp_path / "table.csv", {**TABLE, "files": LaterText}
    row = dict(name='a, "b"', count=1, value=0.5)
    append_record(path, TABLE, row)
    path.write_text(path.read_text() + '"cut off, 1')
    assert read_records(path, columns, exact=True) == ([row | dict(files=None)], 1)
    for _ in range(2):
        add_later_columns(path, columns)
    append_record(path, columns, row | dict(files="plan.json 0"))
    assert header_of(path) == list(columns)
    assert read_records(path, columns, exact=True) == ([row | dict(files=None), row | dict(files="plan.json 0")], 1)
    other = tmp_path / "other.csv"  # of another program
    other.write_text("name,count\n")
    add_later_columns(other, columns)
    assert other.read_text() == "name,count\n"
    add_later_columns(tmp_path / "absent.csv", columns)
    assert not (tmp_path / "absent.csv").exists()


def test_damaged_lines_are_counted_and_the_good_ones_kept(tmp_path) -> None:
    path = tmp_path / "table.csv"
    append_record(path, TABLE, dict(name="a\nb", count=1, value=0.5))
    path.write_bytes(path.read_bytes() + b'x,1\nx,1,2,3\nx,one,2\nx,1,two\n"x,1,1\n\n\0\0\nb,,\n"cut off, 1')
    append_record(path, TABLE, dict(name="c"))
    records, damaged = read_records(path, TABLE)
    assert records == [
        dict(name="a b", count=1, value=0.5),
        dict(name="b", count=None, value=None),
        dict(name="c", count=None, value=None),
    ]
    assert damaged == 7


@pytest.mark.parametrize(
    "header, words",
    [
        ("name,count", "lacks value"),
        ("", "lacks name"),
        ("name,count,value,x", "also x"),
        ("name,value,count", "another order"),
        ("x" * 200_000, "lacks name"),  # more than a cell may have: no CSV at all
    ],
)
def test_a_table_of_another_version_is_refused(tmp_path, header, words) -> None:
    path = tmp_path / "table.csv"
    path.write_text(header + "\n")
    with pytest.raises(InputError, match=f"another version.*{words}"):
        read_records(path, TABLE, exact=True)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for write in (check_writable, lambda path: append_record(path, TABLE, dict(name="a"))):
        with pytest.raises(OSError, match="cannot write .*table.csv"):
            write(tmp_path / "file" / "table.csv")
    check_writable(tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()
    with pytest.raises(InputError, match="table.csv cannot be read"):
        read_records(tmp_path / "table.csv", TABLE)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("c*_*.csv")), ids=lambda path: path.name)
def test_tables_that_were_published_can_still_be_read(path) -> None:
    kinds = [columns for columns in (cost.COLUMNS, compare.COLUMNS) if header_of(path)[0] == "model" and
             set(earlier_columns(columns)) <= set(header_of(path))]  # fmt: skip
    if not kinds:
        pytest.skip("a table of an example's own")
    records, damaged = read_records(path, kinds[0], exact=True)
    assert damaged == 0 and len(records) == len(path.read_text().splitlines()) - 1
