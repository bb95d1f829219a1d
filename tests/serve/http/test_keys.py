"""Key files and the addresses that need them."""

import pytest

from qsun.errors import QsunError
from qsun.serve.http.keys import check_exposed, is_loopback, read_keys


def test_comments_and_blank_lines_are_not_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# of the team, until May\n first-key \n\n  # retired: old-key-000\nsecond-key\r\n")
    assert read_keys(file) == ("first-key", "second-key")
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no API key"), (b"# a\n \n", "no API key"), (b"\xff\n", "cannot be read")]
)
def test_a_file_without_keys_is_refused(tmp_path, content, message):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(QsunError, match=message):
        read_keys(file)
    with pytest.raises(QsunError, match="cannot be read"):
        read_keys(tmp_path / "nothing")


def test_only_loopback_needs_no_key():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"))
    for host in ("0.0.0.0", "::", "example.org", "10.0.0.1", ""):  # noqa: S104
        assert not is_loopback(host)
        with pytest.raises(QsunError, match="no API key is set"):
            check_exposed(host, protected=False)
        check_exposed(host, protected=True)
