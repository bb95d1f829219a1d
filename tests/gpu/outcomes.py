"""A pytest plugin of `make gpu`: outcomes as they come, so that a run cut short keeps them, and parts of a run.

`pytest -p tests.gpu.outcomes --outcomes FOLDER --part 0/8` runs every eighth test and appends to FOLDER/tests.jsonl.
"""

from pathlib import Path

import pytest

from tests.gpu.bench import append


def pytest_addoption(parser):
    group = parser.getgroup("outcomes of make gpu")
    group.addoption("--outcomes", type=Path, help="folder of tests.jsonl")
    group.addoption("--part", default="0/1", help="NUMBER/PARTS: run every test of this part")


def pytest_configure(config):
    if config.getoption("--outcomes") is not None:
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes"), config.getoption("--part")))


class Outcomes:
    def __init__(self, folder, part):
        self.folder, (self.part, self.parts) = folder, map(int, part.split("/"))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[self.part :: self.parts]
        append(self.folder, "tests", {"part": self.part, "selected": len(items)})

    def pytest_collectreport(self, report):
        if report.failed:
            self.add(report, "failed")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.add(report, "failed")
        elif report.skipped or report.when == "call":
            self.add(report, report.outcome)

    def add(self, report, outcome):
        why = str(report.longrepr or "").strip().splitlines() if outcome == "failed" else []
        reason = next((line[1:].strip() for line in why if line.startswith("E ")), why[-1] if why else "")
        append(self.folder, "tests", {"test": report.nodeid, "outcome": outcome} | ({"why": reason} if why else {}))
