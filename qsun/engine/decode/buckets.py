"""Sizes that decode steps of fixed shape are rounded up to, so that there are few of them."""

_LEAST_COLUMNS = 256


def column_buckets(most: int) -> list[int]:
    """Return 256, 384, 512, 768, 1024 ... below `most`, and `most`."""
    sizes = (_LEAST_COLUMNS * step << octave for octave in range(most.bit_length()) for step in (2, 3))
    return [*(size // 2 for size in sizes if size // 2 < most), most]


def columns_bucket(columns: int, most: int) -> int:
    """Return the smallest bucket of at least so many columns; `most` where none is."""
    return next((bucket for bucket in column_buckets(most) if bucket >= columns), most)


def row_buckets(most: int) -> list[int]:
    """Return the powers of two below `most`, and `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def rows_bucket(rows: int) -> int:
    """Return the smallest power of two of at least so many rows."""
    return 1 << (rows - 1).bit_length()


def seen_columns(columns: int, own_only: bool) -> list[int]:
    """Return the columns that steps over buffers of this many attend to.

    own_only: attention reads only the columns that a row has, so that one size is enough.
    """
    return [*([] if own_only else [size for size in (256, 1024, 4096, 16384, 65536) if size < columns]), columns]
