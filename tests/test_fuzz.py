"""Broken files and requests through every reader (`fuzzing` says how), and proof that the harness sees what is wrong.

make test-fuzz MUTANTS=2000
python -m pytest tests/test_fuzz.py -m fuzz --mutant gguf-f16:17
"""

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzzing import broken, pool
from fuzzing.mutant import copy, shares
from fuzzing.readers import READERS

APART = 100_000  # numbers of one seed
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is read from /proc")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    with contextlib.closing(pool.Pool(tmp_path_factory.mktemp("fuzz"))) as found:
        yield found


def chosen(config, reader):
    """The numbers of the mutants that a reader gets."""
    if alone := config.getoption("--mutant"):
        name, _, number = alone.partition(":")
        return [int(number)] if name == reader else []
    first = APART * config.getoption("--fuzz-seed")
    return range(first, first + shares(list(READERS.values()), config.getoption("--mutants"))[reader])


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_mutants_are_refused_with_a_sentence_or_read_as_they_should(name, readers, pytestconfig):
    reader = READERS[name]
    for needed in reader.needs:
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    numbers = chosen(pytestconfig, name)
    if not numbers:
        pytest.skip("another reader's mutant is wanted")
    outcomes = list(readers.run((reader, number) for number in numbers))
    print(f"{name}: {len(outcomes)} mutants, {pool.report(outcomes)}")
    if pytestconfig.getoption("--mutant"):
        print(outcomes[0].line())
    failed = [found.line() for found in outcomes if not found.fine]
    if failed:
        pytest.fail(f"{len(failed)} of {len(outcomes)} mutants:\n" + "\n".join(failed), pytrace=False)


def test_what_is_wrong_is_seen(tmp_path):
    limits = pool.Limits(asleep=1, memory=200 * 2**20)
    with contextlib.closing(pool.Pool(tmp_path, "fuzzing.broken", limits)) as harness:
        found = harness.run((reader, 0) for reader in broken.READERS.values())
        assert {each.name.removesuffix(":0"): each.kind for each in found} == broken.KINDS


def tree(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["safetensors", "torch", "gguf-q4", "tokenizer-json", "http-chat", "options"])
def test_a_name_says_all_of_a_mutant(name, tmp_path):
    """Made twice it is the same, and it is none of the good files."""
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    reader.make(tmp_path / "good")
    good, seen = tree(tmp_path / "good"), []
    for number in range(12):
        made = []
        for folder in (tmp_path / f"{number}a", tmp_path / f"{number}b"):
            copy(tmp_path / "good", folder)
            said = reader.mutate(number, folder)
            sparse = any(path.stat().st_size > 2**30 for path in folder.rglob("*") if path.is_file())
            made.append(
                (said, None if sparse or any(path.is_symlink() for path in folder.rglob("*")) else tree(folder))
            )
        assert made[0] == made[1] and made[0][1] != good, made[0][0]
        seen.append(made[0][0])
    assert len(set(seen)) > 6


def test_every_reader_gets_its_share():
    given = shares(list(READERS.values()), 2000)
    assert sum(given.values()) == 2000 and min(given.values()) >= 1
    assert all(
        most >= few for most, few in zip(given.values(), shares(list(READERS.values()), 200).values(), strict=True)
    )
