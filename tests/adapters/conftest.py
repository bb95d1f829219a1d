"""A base of 512 positions, its quantized decode module, and sixteen adapters of each kind."""

import pytest

import qsun
from tests.adapter_rig import KINDS, write_adapter


@pytest.fixture(scope="session")
def quantized(base_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "int4"
    qsun.quantize(base_directory, out, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    return out


@pytest.fixture(scope="session")
def adapters(base_directory, quantized, tmp_path_factory):
    """Factory: adapters(tuned_on) -> {name: directory}."""
    made = {}

    def make(tuned_on="base"):
        if tuned_on not in made:
            folder = tmp_path_factory.mktemp("adapters")
            own = quantized if tuned_on == "decode" else None
            made[tuned_on] = {
                f"task{i}": write_adapter(folder / f"task{i}", base_directory, i, 1 + i % 5, KINDS[i % 4], own)
                for i in range(16)
            }
        return made[tuned_on]

    return make
