import zipfile

import numpy as np
import pytest

from capmerge.files.npz import Npz


def test_direct_way_equals_numpy(tmp_path):
    """The direct reader gives numpy's dtypes, shapes and values, without using numpy.load."""
    contents = {
        "a": np.arange(6.0).reshape(2, 3),
        "b_4x5": np.float16(2),
        "c": np.zeros((0, 4), ">i2"),
        "d": np.array(["x", "yy"]),
    }
    np.savez(tmp_path / "a.npz", **contents)
    with Npz(tmp_path / "a.npz") as found, np.load(tmp_path / "a.npz") as expected:
        assert list(found.names) == expected.files
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)
        assert found._slow is None


@pytest.mark.parametrize("odd", ["fortran", "comment", "unicode", "text"])
def test_odd_zips_go_through_numpy(tmp_path, odd):
    """A zip with another layout than numpy writes is read by numpy.load."""
    path = tmp_path / "a.npz"
    latents = np.arange(24.0).reshape(4, 3, 2)
    name = "größe" if odd == "unicode" else "latents"
    np.savez(path, **{name: np.asfortranarray(latents) if odd == "fortran" else latents})
    if odd in ("comment", "text"):
        with zipfile.ZipFile(path, "a") as file:
            if odd == "comment":
                file.comment = b"made by hand"
            else:
                file.writestr("readme.txt", "x")
    with Npz(path) as found:
        np.testing.assert_array_equal(found[name], latents)
        assert found._slow is not None
        with pytest.raises(KeyError):
            found["none"]
