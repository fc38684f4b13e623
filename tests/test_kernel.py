"""What the notebooks' first cells find lacking, and what pip is asked for. (Whole, in Colab's runtime: test_colab.)"""

import sys
import zipfile
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from minicpm_data import kernel
from weights_io.errors import InputError


def test_what_a_backend_needs_is_what_its_extra_says():
    """Of other packages; on a TPU libtpu too."""
    names = {extras: {each.name for each in kernel.needed(*extras)} for extras in (("jax",), ("jax", "tpu"), ("mlx",))}
    assert names["jax", "tpu"] == names["jax",] | {"libtpu"} and "minicpm-jax-mlx" not in names["jax", "tpu"]
    assert {"jax", "flax", "numpy", "tyro"} <= names["jax",] and not {"mlx-lm", "fastapi"} & names["jax",]
    assert "jax" not in names["mlx",]
    texts = [str(each) for each in kernel.needed("jax", "tpu")]
    assert any(text.startswith("jax[tpu]>=") for text in texts)


@pytest.mark.parametrize(("version", "holds"), [("0.7.2", False), ("0.12.0.1", True), (None, False)])
def test_whether_a_version_will_do(version, holds):
    found = {} if version is None else {"jax": version}
    assert kernel.met(Requirement("jax>=0.10.2"), found) == holds


@pytest.mark.parametrize("sign", ["TPU_NAME", "COLAB_TPU_ADDR", None])
def test_a_tpu_is_known_by_what_its_host_sets(sign, monkeypatch):
    for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernel.Path, "glob", lambda path, pattern: iter(()))
    if sign:
        monkeypatch.setenv(sign, "local")
    assert kernel.has_tpu() == (sign is not None)


def test_what_changed_is_said_with_jax_first():
    before = {"absl-py": "1.4.0", "jax": "0.7.2", "numpy": "2.1.3"}
    after = {"absl-py": "2.0", "jax": "0.11.2", "numpy": "2.1.3", "libtpu": "0.0.48.1", "tyro": "1.0", "gguf": "0.17"}
    line = ", ".join(kernel.changes(before, after))
    assert line == "jax 0.7.2 -> 0.11.2, absl-py 1.4.0 -> 2.0, libtpu 0.0.48.1, 2 new packages"


def test_what_was_replaced_under_a_kernel(monkeypatch):
    """A build of one's own may call itself otherwise than its package does."""
    assert kernel.replaced(kernel.versions()) == set()
    for version, stale in (("0.7.2", {"jax"}), ("0.11.2", set()), ("0.12.1.dev20260801+abc", set())):
        monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(__version__=version))
        assert kernel.replaced({"jax": "0.11.2"}) == stale


def test_an_import_that_was_replaced_asks_for_a_restart(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(__version__="0.7.2"))
    with pytest.raises(InputError, match="jax was replaced since; restart the runtime") as stopped:
        kernel.install("jax")
    assert stopped.value._render_traceback_() == [f"error: {stopped.value}"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """All that pip finds: two releases of one small package, and one of another. It installs into a folder."""
    for name, version, needs in (("tiny_base", "1.0", ""), ("tiny_base", "2.0", ""), ("tiny_top", "1.0", "tiny-base")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as file:
            requires = f"Requires-Dist: {needs}\n" if needs else ""
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": tmp_path, "TARGET": tmp_path / "target"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    return tmp_path


@pytest.mark.parametrize(("wanted", "kept"), [("tiny-top", "1.0"), ("tiny-base>=2", "2.0")])
def test_a_version_is_kept_where_pip_can_keep_it(wanted, kept, index):
    kernel.run_pip([Requirement(f"{wanted}; extra == 'jax'")], {"tiny-base": "1.0", "never-here": "1.0"})
    assert {path.name for path in (index / "target").glob("tiny_base*")} == {f"tiny_base-{kept}.dist-info"}


def test_what_pip_cannot_is_said_in_a_sentence(index, capsys):
    with pytest.raises(InputError, match="pip could not install"):
        kernel.run_pip([Requirement("tiny-base>=3")], {})
    assert "tiny-base>=3" in capsys.readouterr().out
