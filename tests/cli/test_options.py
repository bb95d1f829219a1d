"""A command's options over the settings of its --config file."""

import pytest

from qsun.cli.terminal.options import names, settings_and_inputs, whole_numbers
from qsun.config import QuantConfig
from qsun.errors import QsunError


def settings(options):
    return settings_and_inputs(QuantConfig, options, {})[0]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("bits: 3\ngroup-size: 64\nsweeps: 1\n")
    return path


def test_options_win_over_the_file_and_the_file_over_defaults(file):
    options = {"config": file, "bits": 2, "group_size": None, "seed": None, "device": "cpu"}
    found = settings(options)
    assert found == QuantConfig(bits=2, group_size=64, sweeps=1)


def test_an_option_can_switch_off_what_the_file_switches_on(tmp_path):
    (tmp_path / "s.yaml").write_text("sym: true\n")
    assert settings({"config": tmp_path / "s.yaml", "sym": False}).sym is False


def test_without_a_file(file):
    assert settings({"config": None, "bits": None}) == QuantConfig()


def test_an_unknown_key_is_refused(file):
    file.write_text("bitz: 3\n")
    with pytest.raises(QsunError, match="unknown setting 'bitz'"):
        settings({"config": file})


def test_names_may_have_spaces_around_their_commas():
    assert names("qsun_math, qsun_code ,,") == ["qsun_math", "qsun_code"]


def test_tasks_may_have_spaces_around_their_commas(cli, tmp_path):
    answer = cli("eval", "--decode", "demo", "--tasks", "qsun_math, nothing", "-o", tmp_path / "out")
    assert answer.code == 2 and "task 'nothing' is not known" in answer.err


@pytest.mark.parametrize("text", ["1,0", "x", "²", "1.5", "-1"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(QsunError, match=r"rows has .*; use whole numbers from 1 up"):
        whole_numbers("rows", text)
    assert whole_numbers("rows", "1, 16") == [1, 16]
