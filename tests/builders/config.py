"""Configs for tests: the least that a run needs, and further settings by their names."""

from capmerge.toml import to_toml
from trainer.config.load import load_config

LEAST = {
    "model": {"family": "sd1", "path": "random"},
    "data": [{"metadata": "meta.json", "latents": "latents"}],
    "train": {"output_dir": "out", "max_steps": 10},
}


def write(path, document):
    """Write a config file of sections, which are dicts, and `data` a list of dicts; its path."""
    lines = []
    for section, values in document.items():
        for header, one in (
            [(f"[[{section}]]", entry) for entry in values]
            if isinstance(values, list)
            else [(f"[{section}]", values)]
        ):
            lines += [header, *(f"{name} = {to_toml(value)}" for name, value in one.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(folder, settings=None, *overrides):
    """The config that is loaded from a file of `LEAST` and `settings`, with `--set` overrides.

    Settings are named `section.key` or `section.key.argument`.
    """
    document = {
        name: [dict(one) for one in values] if name == "data" else dict(values)
        for name, values in LEAST.items()
    }
    for name, value in (settings or {}).items():
        section, key, *argument = name.split(".")
        holder = document["data"][0] if section == "data" else document.setdefault(section, {})
        if argument:
            holder.setdefault(key, {})[argument[0]] = value
        else:
            holder[key] = value
    return load_config(write(folder / "config.toml", document), overrides)
