"""An export over an earlier one: whatever ends it, a whole model is in the folder."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.models.folder import Planned, Tensors, TensorWriter

PLAN = [Planned(name, (4, 8), np.dtype(np.float32)) for name in "abc"]
WHOLE = (slice(None), slice(None))


def export(folder: Path, value: float, *, several: bool, until: str = "") -> None:
    with TensorWriter(folder, PLAN, 200 if several else 10**6) as writer:
        for tensor in PLAN:
            if tensor.name == until:
                raise OSError(errno.ENOSPC, "No space left on device")
            writer.write(tensor.name, 0, np.full(tensor.shape, value, tensor.dtype))
        writer.finish()


def found(folder: Path) -> set[float]:
    """The values of the model that is read from the folder."""
    tensors = Tensors(folder)
    assert tensors.names() == set("abc")
    return {float(x) for name in "abc" for x in tensors.read(name, WHOLE).flat}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("several", [False, True])
def test_a_full_disk_leaves_the_earlier_export_and_nothing_else(
    tmp_path: Path, several: bool
) -> None:
    export(tmp_path, 1, several=several)
    before = names(tmp_path)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        export(tmp_path, 2, several=not several, until="c")
    assert names(tmp_path) == before
    assert found(tmp_path) == {1}


def die_after(patch: pytest.MonkeyPatch, changes: int) -> None:
    """The process ends at a later change of a model's file than so many."""
    left = changes

    def dying(real: Any) -> Any:
        def change(path: Path, *args: Any, **options: Any) -> Any:
            nonlocal left
            left -= path.name.startswith("model")
            if left < 0:
                raise KeyboardInterrupt
            return real(path, *args, **options)

        return change

    for name in ("unlink", "rename", "replace"):
        patch.setattr(Path, name, dying(getattr(Path, name)))


@pytest.mark.parametrize(("several", "then"), [(False, False), (False, True), (True, False)])
def test_an_export_that_is_killed_at_its_end_leaves_one_whole_model(
    tmp_path: Path, several: bool, then: bool
) -> None:
    """At each of its changes to the folder; the next export removes what it left."""
    for changes in range(20):
        folder = tmp_path / str(changes)
        folder.mkdir()
        export(folder, 1, several=several)
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, changes)
            try:
                export(folder, 2, several=then)
                break
            except KeyboardInterrupt:
                assert found(folder) in ({1}, {2})
        export(folder, 3, several=then)
        assert found(folder) == {3}
        assert not [name for name in names(folder) if name.endswith(".partial")]
    assert changes > 0
    assert found(folder) == {2}
