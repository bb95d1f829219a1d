"""Server-sent events arrive complete and in order, however the bytes are cut."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun.serve.http.wire import BrokenStream, data_events, encode_event, parse_event

STREAM = b': comment\n\ndata: {"a": 1}\n\ndata: {"b":\r\ndata: 2}\r\n\r\nevent: x\n\ndata: [DONE]\n\n'


def read(pieces):
    async def source():
        for piece in pieces:
            yield piece

    async def collect():
        return [event async for event in data_events(source())]

    return asyncio.run(collect())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_any_cut_of_the_bytes_gives_the_same_events(cuts):
    ends = [0, *cuts, len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(ends)]
    assert read(pieces) == [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]


def test_a_stream_that_ends_inside_an_event_or_says_no_json():
    with pytest.raises(BrokenStream, match="ends inside an event"):
        read([b"data: {}\n\ndata: {"])
    for data in (b"{", b"3", b"\xff"):
        with pytest.raises(BrokenStream):
            parse_event(data)
    assert read([encode_event({"text": "a\n\nb\u2028"})]) == [b'{"text":"a\\n\\nb\\u2028"}']
