"""Sizes that decode steps of fixed shape are rounded up to, so that there are few of them."""

_FINE_FROM = 1024  # steps of 1.25 at most from here on, as buckets are charged to the budget
_ALIGNED, _FEW_ROWS = 16, 8


def column_buckets(most: int) -> list[int]:
    """Return 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560 ... below `most`, and `most`."""
    octaves = range(most.bit_length())
    sizes = [256, 384, 512, 768, *((_FINE_FROM * step << octave) // 4 for octave in octaves for step in (4, 5, 6, 7))]
    return [*(size for size in sizes if size < most), most]


def widened(sizes: list[int], budget: int) -> list[int]:
    """Return the sizes, in ascending order, of as many rows as the budget holds of each of these, and of 1 to 8 rows.

    Each is as wide as its rows can be, and a multiple of 16, except for the last, which stays.
    """
    least, most = sizes[0], sizes[-1]
    counts = {*range(1, _FEW_ROWS + 1), *(budget // size for size in sizes)}
    wide = sorted({most, *(min(most, budget // rows // _ALIGNED * _ALIGNED) for rows in counts)})
    return [*{budget // size: size for size in wide if size >= least}.values()]


def columns_bucket(columns: int, most: int) -> int:
    """Return the smallest bucket of at least so many columns; `most` where none is."""
    return next((bucket for bucket in column_buckets(most) if bucket >= columns), most)


def row_buckets(most: int) -> list[int]:
    """Return the powers of two below `most`, and `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def rows_bucket(rows: int) -> int:
    """Return the smallest power of two of at least so many rows."""
    return 1 << (rows - 1).bit_length()


def seen_columns(columns: int, own_only: bool, coarse: bool) -> list[int]:
    """Return the columns that steps over buffers of this many attend to.

    own_only: attention reads only the columns that a row has, so that one size is enough.
    coarse: few sizes, as all are captured beforehand; otherwise 1.5 times what a step needs at most, or 256.
    """
    if own_only or not coarse:
        return [columns] if own_only else column_buckets(columns)
    return [*(size for size in (256, 1024, 4096, 16384, 65536) if size < columns), columns]
