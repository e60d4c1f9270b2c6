"""Parquet a few rows at a time; texts that many rows share are not written out before their size is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qingtune.data.rules import first_repeated

ROWS, NESTED_ROWS = 1024, 64  # taken at a time; few where lists of texts come written out, as each may be large


class RepeatedColumn(Exception):
    """Two columns have this name."""


@dataclass(frozen=True)
class RecordBatch:
    """A few rows, as pyarrow.RecordBatch; columns of texts that repeat are still dictionaries."""

    content: Any

    @cached_property
    def size(self) -> int:
        """Bytes of the rows when written out."""
        return sum(_written_out(column) for column in self.content.columns)

    @property
    def row_size(self) -> int:
        """The mean of a row, in bytes."""
        return self.size // max(1, self.content.num_rows)

    def rows(self, most: int) -> Iterator[dict[str, Any] | None]:
        """Each row's values; None in place of a row of more bytes."""
        count = self.content.num_rows
        if self.size <= most:
            yield from _values(self.content)
        elif count == 1:
            yield None
        else:
            yield from RecordBatch(self.content.slice(0, count // 2)).rows(most)
            yield from RecordBatch(self.content.slice(count // 2)).rows(most)


def parquet_batches(source: Any) -> Iterator[RecordBatch]:
    """The rows of a Parquet file, given by its path or opened for reading, a few at a time.

    Raises:
        RepeatedColumn: two columns have one name.
        pyarrow.ArrowException, ValueError, OverflowError: the file is broken.
    """
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source)
    names = file.schema_arrow.names
    if (repeated := first_repeated(names)) is not None:
        raise RepeatedColumn(repeated)
    columns = [file.schema.column(number) for number in range(len(file.schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY" and column.path in names]
    flat = all(column.path in names for column in columns)
    file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
    for batch in file.iter_batches(batch_size=ROWS if flat else NESTED_ROWS, use_threads=False):
        yield RecordBatch(batch)


def _written_out(column: Any) -> int:
    """Bytes of a column's values."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    compute: Any = pyarrow.compute
    lengths = compute.binary_length(column.dictionary).cast("int64")
    return compute.sum(lengths.take(column.indices)).as_py() or 0


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    import pyarrow

    columns: list[Any] = []
    for column in batch.columns:
        if pyarrow.types.is_temporal(column.type):  # Python's dates are fewer than Parquet's
            columns.append(column.cast(pyarrow.string()))
        elif pyarrow.types.is_dictionary(column.type):
            columns.append(column.dictionary_decode())
        else:
            columns.append(column)
    yield from pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
