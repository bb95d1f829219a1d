"""Shards that are laid out first and filled in any order: the bytes of safetensors' own files, one after the other."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qsun.errors import ResumeError
from qsun.model.checkpoint import INDEX_FILE, STORED_DTYPES, Checkpoint, read_header
from qsun.model.output_dir import ShardWriter, Workdir, lay_out, stored_as


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 2, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.fixture
def parts() -> list[dict[str, torch.Tensor]]:
    """Every dtype, out of order, scalars and empty tensors too."""
    torch.manual_seed(0)
    dtypes = list(STORED_DTYPES.values())
    first = {f"a.{i % 3}.{i}": random_tensor(dtype, 3, 5) for i, dtype in enumerate(dtypes)}
    second = {f"b.{i}": random_tensor(dtype, 2, i) for i, dtype in enumerate(reversed(dtypes))}
    third = {"c.scalar": random_tensor(torch.float32), "b.ten": random_tensor(torch.bfloat16, 10)}
    return [first, second, third]


def joined(parts, directory) -> bytes:
    """The data of safetensors' own files of the parts."""
    data = b""
    for number, part in enumerate(parts):
        save_file(part, directory / f"{number}.part", {"format": "pt"})
        data += (directory / f"{number}.part").read_bytes()[read_header(directory / f"{number}.part")[1] :]
    return data


def described(parts):
    return [{name: stored_as(tensor) for name, tensor in part.items()} for part in parts]


def test_one_file_holds_the_parts_as_safetensors_writes_them(parts, tmp_path):
    writer = ShardWriter(tmp_path, lay_out(described(parts)))
    for part in reversed(parts):
        writer.write(part)
    file = tmp_path / "model.safetensors"
    entries, start = read_header(file)
    assert file.read_bytes()[start:] == joined(parts, tmp_path)
    assert list(entries) == [name for n in range(3) for name in read_header(tmp_path / f"{n}.part")[0]]
    loaded = load_file(file)
    for name, tensor in (parts[0] | parts[1] | parts[2]).items():
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_one_part_is_the_very_file_that_safetensors_writes(parts, tmp_path):
    ShardWriter(tmp_path, lay_out(described(parts[:1]))).write(parts[0])
    save_file(parts[0], tmp_path / "oracle", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "oracle").read_bytes()


def test_shards_are_cut_between_parts_by_the_size_of_their_files(parts, tmp_path):
    joined(parts, tmp_path)
    sizes = [(tmp_path / f"{n}.part").stat().st_size for n in range(3)]
    assert len(lay_out(described(parts), sum(sizes))) == 1
    assert len(lay_out(described(parts), sum(sizes) - 1)) == 2
    shards = lay_out(described(parts), max(sizes))
    assert [shard.name for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [shard.name[:11] for shard in lay_out(described(parts), 1)] == [f"model-0000{n}" for n in (1, 2, 3)]


def test_shards_have_an_index_that_names_every_tensor(parts, tmp_path):
    writer = ShardWriter(tmp_path, lay_out(described(parts), 1))
    for part in parts:
        writer.write(part)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    names = {name for part in parts for name in part}
    assert index["weight_map"].keys() == names == set(Checkpoint(tmp_path).names())
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in parts for t in part.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), next(part[name] for part in parts if name in part))


def test_a_file_that_an_interrupted_run_began_keeps_what_it_holds(parts, tmp_path):
    shards = lay_out(described(parts))
    ShardWriter(tmp_path, shards).write(parts[0])
    again = ShardWriter(tmp_path, shards)
    for part in parts[1:]:
        again.write(part)
    assert (tmp_path / "model.safetensors").read_bytes().endswith(joined(parts, tmp_path))


def test_a_run_that_ended_before_it_wrote_its_settings_is_begun_anew(tmp_path):
    with Workdir(tmp_path / "out", {"a": 1}, resume=False) as killed:
        (killed.root / "run.json").unlink()
    with Workdir(tmp_path / "out", {"a": 2}, resume=True) as work:
        assert json.loads((work.root / "run.json").read_text()) == {"a": 2}
        work.note("part", {})
        (work.root / "run.json").unlink()
    with pytest.raises(ResumeError, match="a was None and is now 2"):
        Workdir(tmp_path / "out", {"a": 2}, resume=True)


def test_only_the_process_that_has_the_lock_writes_the_settings(tmp_path, monkeypatch):
    with Workdir(tmp_path / "out", {"a": 1}, resume=False) as first:
        monkeypatch.setattr("qsun.model.output_dir.write_json", None)  # all of a run's processes would, at once
        Workdir(tmp_path / "out", {"a": 1}, resume=True, lock=False)
        assert json.loads((first.root / "run.json").read_text()) == {"a": 1}
