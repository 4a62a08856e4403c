import json
import subprocess
import tomllib

import pytest
from builders.commands import needs_linux
from builders.metadata import COMMAND, as_indent_2, run


@pytest.mark.parametrize(
    "name",
    ["out.json", "with space.json", 'quote".json', "😀.json"],
)
@needs_linux
def test_the_dataset_config_is_toml_for_sd_scripts(source, name):
    """OUT.dataset.toml parses, turns wildcards on, and names OUT and its folder."""
    out = source.with_name(name)
    run("rewrite", source, "-o", out)
    config = tomllib.loads(source.with_name(name + ".dataset.toml").read_text(encoding="utf-8"))
    assert config["general"]["enable_wildcard"] is True
    ((subset,),) = ([*dataset["subsets"]] for dataset in config["datasets"])
    assert subset["metadata_file"] == str(out)
    assert subset["image_dir"] == str(out.parent)
    assert config["datasets"][0]["enable_bucket"] is True
    assert "resolution" not in config["datasets"][0]  # one record has its picture's own size
    assert "cache_text_encoder_outputs" not in json.dumps(config)


def test_a_resolution_beyond_all_bounds_does_not_stop_the_run(source):
    """A train_resolution of absurd size goes through like any other value."""
    source.write_bytes(as_indent_2({"k": {"caption": "c", "train_resolution": [10**200, 10**200]}}))
    done = subprocess.run([*COMMAND, "rewrite", source], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
