import re
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from builders.config import LEAST, load, write
from builders.paths import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capmerge.toml import to_toml
from trainer.config.load import load_config, resolved_toml, with_seed
from trainer.config.settings import Config, DataSettings
from trainer.errors import ConfigError

TRAIN_KEYS = (
    "The keys there are output_dir, max_steps, max_epochs, seed, batch_size, accumulation, "
    "workers, precision and on_nonfinite."
)
SECTIONS = (
    "Sections are model, data, caption, text, noise, loss, optimizer, train, speed, engine, ema, "
    "validation, checkpoint, export, samples, log and cache."
)
TWO_SETS = ("data.1.metadata=second.json", "data.1.latents=second")


def refusal(folder, text, *overrides):
    """The error about a file with this text, without the name of the folder."""
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.exit_code == 2
    return str(refused.value).replace(f"{folder}/", "")


def refusal_of(folder, *overrides, **sections):
    """The error about `LEAST` with these sections added or replaced; None removes one."""
    document = {name: values for name, values in (LEAST | sections).items() if values is not None}
    return refusal(
        folder, write(folder / "config.toml", document).read_text(encoding="utf-8"), *overrides
    )


def test_as_little_as_a_run_needs(tmp_path):
    """Five settings make a config, and relative paths count from the current directory."""
    config = load(tmp_path)
    assert config.data[0].metadata == Path("meta.json")
    assert (config.text.max_tokens, config.optimizer.name, config.train.seed) == (
        225,
        "AdamW",
        None,
    )


ALL_WRONG = """
seed = 3
[model]
family = "sd15"
path = "random"
[[data]]
metadata = "a"
latents = 3
repeets = 3
caption = {shufle = true, dropout_rate = 0.1}
[optimiser]
name = "x"
[optimizer]
learing_rate = 1e-4
clip_grad_norm = -1
arguments = 5
schedule_arguments = {powr = 1, step_rules = "abc"}
[loss]
huber_c = 0.2
[text]
max_tokens = 80
[caption]
tag_dropout_rate = 2
token_warmup_steps = true
[train]
batch_size = 0
max_steps = 1e4
learning_rate = 3
[noise]
min_timestep = 900
max_timestep = 500
[log]
trackers = ["tensorbord", 1]
samples = 1
"""
ALL_SAID = """\
config.toml: `model.family` is "sd15", expected "sd1", "sd2" or "sdxl". Did you mean "sd1"?
config.toml: `data.latents` is 3, expected a path in quotes.
config.toml: unknown key `shufle` in [data.caption]. Did you mean `shuffle`?
config.toml: unknown key `repeets` in [[data]]. Did you mean `repeats`?
config.toml: `caption.tag_dropout_rate` is 2, expected a number from 0 to 1.
config.toml: `caption.token_warmup_steps` is true, expected a number from 0 to 1,000,000,000.
config.toml: `text.max_tokens` is 80, expected a multiple of 75 up to 75,000 or "unlimited".
config.toml: `optimizer.arguments` is 5, expected a table.
config.toml: `optimizer.schedule_arguments.step_rules` is "abc", expected text such as \
"1:10,0.1:20,0.01".
config.toml: unknown key `powr` in [optimizer.schedule_arguments]. Did you mean `power`?
config.toml: `optimizer.clip_grad_norm` is -1, expected a number, 0 or more.
config.toml: unknown key `learing_rate` in [optimizer]. Did you mean `learning_rate`?
config.toml: found no `output_dir` in [train], expected a path in quotes. \
Add output_dir = ... there.
config.toml: `train.max_steps` is 10000.0, expected a whole number from 1 to 1,000,000,000.
config.toml: `train.batch_size` is 0, expected a whole number from 1 to 8192.
config.toml: unknown key `learning_rate` in [train]. Did you mean `optimizer.learning_rate`?
config.toml: `log.samples` is 1, expected true or false.
config.toml: `log.trackers` is ["tensorbord", 1], expected a list of "tensorboard" or "wandb".
config.toml: unknown key `seed` outside of any section. Did you mean `train.seed`?
config.toml: unknown section [optimiser]. Did you mean [optimizer]?
config.toml: `noise.min_timestep = 900` is not below `noise.max_timestep = 500`. \
Lower the first or raise the second.
config.toml: `loss.huber_c` has no effect with `loss.kind = "l2"`. \
Remove it, or set loss.kind to huber or smooth_l1.
"""


def test_everything_wrong_is_told_at_once(tmp_path):
    """All mistakes and conflicts of a file are told in one error, one line each."""
    assert refusal(tmp_path, ALL_WRONG).splitlines() == ALL_SAID.splitlines()


def test_a_conflict_that_may_come_from_a_mistake_is_not_told(tmp_path):
    """With `kind` misspelt, `huber_c` is not called without effect, because it may have one."""
    said = refusal_of(tmp_path, loss={"knd": "huber", "huber_c": 0.2})
    assert said == "config.toml: unknown key `knd` in [loss]. Did you mean `kind`?"
    assert "has no effect" not in refusal_of(tmp_path, los={"kind": "huber"}, loss={"huber_c": 0.2})
    sets = [{**LEAST["data"][0], "caption": {"shufle": True}}]
    assert "has no effect" not in refusal_of(tmp_path, data=sets, caption={"keep_tokens": 1})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimizer.learing_rate=1",
            "unknown key `learing_rate` in [optimizer]. Did you mean `learning_rate`?",
        ),
        ("optimiser.learning_rate=1", "unknown section [optimiser]. Did you mean [optimizer]?"),
        (
            "optimizer.max_steps=5",
            "unknown key `max_steps` in [optimizer]. Did you mean `train.max_steps`?",
        ),
        ("data.repeets=2", "unknown key `repeets` in [[data]]. Did you mean `repeats`?"),
        (
            "data.0.caption.shufle=true",
            "unknown key `shufle` in [data.caption]. Did you mean `shuffle`?",
        ),
        (
            "train.batch_size=many",
            '`train.batch_size` is "many", expected a whole number from 1 to 8192.',
        ),
        (
            "train.batch_size.x=1",
            "`train.batch_size` is {x = 1}, expected a whole number from 1 to 8192.",
        ),
        ("train.max_steps.x=1", "found `max_steps` set to 10, expected a table to put it into."),
        (
            "text.chunking=kohja",
            (
                '`text.chunking` is "kohja", expected "kohya", "a1111" or "crop". '
                'Did you mean "kohya"?'
            ),
        ),
        ("train.foo=1", f"unknown key `foo` in [train]. {TRAIN_KEYS}"),
        ("train.seed", "expected section.key=value, such as train.max_steps=20."),
        ("seed=1", "expected section.key=value, such as train.max_steps=20."),
        ("train..seed=1", "expected section.key=value, such as train.max_steps=20."),
        ("train.output_dir=\udcff", "expected section.key=value, such as train.max_steps=20."),
        ("data.1=x", "expected a key after the number of the data set, such as data.1.repeats=2."),
        (
            "data.2.repeats=2",
            "found 1 [[data]], counted from 0, expected one of them, or data.1 for a new one.",
        ),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, said):
    """A mistake in an override names the override and gives the same hints as one in a file."""
    shown = override.replace("\udcff", "\\udcff")
    assert refusal_of(tmp_path, override) == f"--set {shown}: {said}"


def test_mistakes_in_file_and_overrides_are_told_together(tmp_path):
    """Each mistake has a line, wherever it comes from."""
    lines = refusal_of(
        tmp_path, "train.workers=-1", "oops", train={**LEAST["train"], "batch_size": 0}
    ).splitlines()
    assert lines == [
        "--set oops: expected section.key=value, such as train.max_steps=20.",
        "config.toml: `train.batch_size` is 0, expected a whole number from 1 to 8192.",
        "--set train.workers=-1: `train.workers` is -1, expected a whole number from 0 to 256.",
    ]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": None}, "found no section [model]. Add it with family and path."),
        ({"train": None}, "found no section [train]. Add it with output_dir."),
        (
            {"data": None},
            "found no [[data]], expected at least one. Add [[data]] with metadata and latents.",
        ),
        (
            {"data": {"metadata": "a", "latents": "b"}},
            "found [data], expected [[data]] in double brackets, because there may be several.",
        ),
        (
            {"data": [{"metadata": "a", "latents": "b", "repeats": 0}]},
            "`data.repeats` is 0, expected a whole number from 1 to 10,000.",
        ),
        (
            {"data": [{"metadata": "a"}]},
            "found no `latents` in [[data]], expected a path in quotes. Add latents = ... there.",
        ),
        (
            {"model": {"family": "sd1", "path": ""}},
            '`model.path` is "", expected text in quotes that is not empty.',
        ),
        (
            {"model": {**LEAST["model"], "freeze": "a"}},
            (
                '`model.freeze` is "a", expected a list of text in quotes. '
                'Write model.freeze = ["a"], or --set \'model.freeze=["a"]\'.'
            ),
        ),
        (
            {"optimizer": {"schedule_arguments": 1}},
            (
                "`optimizer.schedule_arguments` is 1, "
                "expected a section [optimizer.schedule_arguments]."
            ),
        ),
        (
            {"optimizer": {"learning_rate": float("inf")}},
            "`optimizer.learning_rate` is inf, expected a number, 0 or more.",
        ),
        ({"caption": {"shuffle": 1}}, "`caption.shuffle` is 1, expected true or false."),
        (
            {"noise": {"max_timestep": 1001}},
            "`noise.max_timestep` is 1001, expected a whole number from 1 to 1000.",
        ),
        (
            {"noise": {"multires_discount": 0}},
            "`noise.multires_discount` is 0, expected a number, above 0 and at most 1.",
        ),
        ({"zzz": {"a": 1}}, f"unknown section [zzz]. {SECTIONS}"),
        (
            {"train": {"output_dir": "x", "max_steps": 1, "x" * 90: 1}},
            f"unknown key `{'x' * 90}` in [train]. {TRAIN_KEYS}",
        ),
        (
            {"train": {"output_dir": "x"}},
            (
                "found neither `train.max_steps` nor `train.max_epochs`, expected one of them. "
                "Add max_steps = 1000 to [train]."
            ),
        ),
    ],
)
def test_one_mistake_is_one_line(tmp_path, sections, said):
    """A missing or wrong section or setting is told in one line with what was expected."""
    assert refusal_of(tmp_path, **sections) == f"config.toml: {said}"


@pytest.mark.parametrize(
    "text",
    [
        "model = 3\n",
        "data = 3\n",
        "data = []\n",
        "data = [1]\n",
        "caption = []\n",
        "[[datasets]]\nx = 1\n",
        "",
    ],
)
def test_sections_of_another_kind(tmp_path, text):
    """Any value in the place of a section leads to a message."""
    for line in refusal(tmp_path, text).splitlines():
        assert line.startswith("config.toml: ")
        assert "expected" in line or "Add it" in line or "Did you mean" in line


VALUES = [
    1,
    -1.5,
    True,
    "",
    "x",
    [],
    ["x"],
    [{}],
    [[1]],
    {},
    {"x": 1},
    {"shuffle": "x"},
    [{"metadata": 1, "caption": 2}],
]


@pytest.mark.parametrize("name", Config.model_fields)
def test_no_value_is_a_bug(tmp_path, name):
    """With any value in any place, the config loads or its mistakes are told."""
    section = Config.model_fields[name].annotation
    fields = DataSettings.model_fields if name == "data" else section.model_fields
    for value in VALUES:
        for changed in (
            value,
            *(
                {**LEAST.get(name, [{}])[0], key: value} if name == "data" else {key: value}
                for key in (*fields, "x")
            ),
        ):
            document = {
                **LEAST,
                name: [changed] if name == "data" and changed is not value else changed,
            }
            text = "\n".join(f"{key} = {to_toml(one)}" for key, one in document.items())
            (tmp_path / "config.toml").write_text(text, encoding="utf-8")
            with suppress(ConfigError):
                load_config(
                    tmp_path / "config.toml",
                    ["data.1.repeats=2", "train.workers=1", "loss.kind=l1"],
                )
            with suppress(ConfigError):
                load_config(tmp_path / "config.toml")


def test_several_data_sets_are_told_apart(tmp_path):
    """With several data sets, a message names the one it means as `--set` does."""
    sets = [
        {"metadata": "a", "latents": "b"},
        {"metadata": "c", "latents": "d", "repeets": 2, "repeats": 0},
    ]
    assert refusal_of(tmp_path, data=sets).splitlines() == [
        "config.toml: `data.1.repeats` is 0, expected a whole number from 1 to 10,000.",
        "config.toml: unknown key `repeets` in [[data]] of data.1. Did you mean `repeats`?",
    ]


def test_long_values_are_cut_short_and_made_printable(tmp_path):
    """A message shows the beginning of a long value, and no control character as it is."""
    said = refusal_of(tmp_path, train={"output_dir": "x", "max_steps": "\x1b[31m" + "y" * 500})
    shown = f'"\\u001b[31m{"y" * 68}…'
    assert said == (
        f"config.toml: `train.max_steps` is {shown}, "
        "expected a whole number from 1 to 1,000,000,000."
    )


def test_toml_that_cannot_be_read(tmp_path):
    """A mistake in the syntax is told with its line and column."""
    said = refusal(tmp_path, "[model]\nfamily = sd1\n")
    assert said.startswith("config.toml: not valid TOML: ")
    assert "line 2, column 10" in said


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a folder, and bytes that are not text are told without a traceback."""
    (tmp_path / "latin.toml").write_bytes(b'[model]\nfamily = "\xe9"\n')
    for name, said in [
        ("none.toml", "no such file"),
        ("", "Is a directory"),
        ("latin.toml", "byte 18: this is not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / name)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    """Windows editors put one at the head of UTF-8 files."""
    path = write(tmp_path / "config.toml", LEAST)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path) == load(tmp_path)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.output_dir=/x/y z", lambda config: config.train.output_dir, Path("/x/y z")),
        ('train.output_dir="/x/y"', lambda config: config.train.output_dir, Path("/x/y")),
        ("train.output_dir=a=b", lambda config: config.train.output_dir, Path("a=b")),
        (
            "train.output_dir=1\nmax_steps = 5",
            lambda config: config.train.output_dir,
            Path("1\nmax_steps = 5"),
        ),
        ("train.max_steps=20_000", lambda config: config.train.max_steps, 20_000),
        ("text.chunking=a1111", lambda config: config.text.chunking, "a1111"),
        ("text.max_tokens=unlimited", lambda config: config.text.max_tokens, "unlimited"),
        ("optimizer.learning_rate=1e-4", lambda config: config.optimizer.learning_rate, 1e-4),
        ("optimizer.learning_rate=1", lambda config: config.optimizer.learning_rate, 1.0),
        (
            "model.freeze=['conv_in.*', \"up*\"]",
            lambda config: config.model.freeze,
            ("conv_in.*", "up*"),
        ),
        ('log.trackers=["wandb"]', lambda config: config.log.trackers, ("wandb",)),
        ("data.metadata=a.json", lambda config: config.data[0].metadata, Path("a.json")),
        ("data.0.metadata=a.json", lambda config: config.data[0].metadata, Path("a.json")),
        (
            "data.1.metadata=b.json",
            lambda config: [str(one.metadata) for one in config.data],
            ["meta.json", "b.json"],
        ),
        ("data.caption.shuffle=true", lambda config: config.caption_of(0).shuffle, True),
        (
            "data.1.caption.shuffle=true",
            lambda config: [config.caption_of(0).shuffle, config.caption_of(1).shuffle],
            [False, True],
        ),
        (
            "optimizer.arguments.weight_decay=0.1",
            lambda config: config.optimizer.arguments,
            {"weight_decay": 0.1},
        ),
        (
            "optimizer.arguments={betas = [0.9, 0.99]}",
            lambda config: config.optimizer.arguments,
            {"betas": [0.9, 0.99]},
        ),
        (" train.seed = 5", lambda config: config.train.seed, 5),
    ],
)
def test_overrides(tmp_path, override, read, value):
    """`--set` reads TOML values and bare words; `data.x` means the first data set."""
    second = TWO_SETS if override.startswith("data.1") else ()
    found = read(load(tmp_path, None, *second, override))
    assert (found, type(found)) == (value, type(value))


def test_overrides_replace_and_the_last_one_counts(tmp_path):
    """An override replaces the value in the file or in an earlier one, and nothing else."""
    settings = {"optimizer.arguments.weight_decay": 0.1, "optimizer.arguments.eps": 1e-6}
    config = load(
        tmp_path,
        settings,
        "train.max_steps=2",
        "train.max_steps=3",
        "optimizer.arguments.weight_decay=0.2",
    )
    assert config.train.max_steps == 3
    assert config.optimizer.arguments == {"weight_decay": 0.2, "eps": 1e-6}


def test_a_data_set_replaces_single_caption_settings(tmp_path):
    """`[data.caption]` changes the settings it names, and the rest comes from `[caption]`."""
    overrides = (*TWO_SETS, "data.1.caption.shuffle=false", "data.1.caption.dropout_rate=0.2")
    config = load(tmp_path, {"caption.shuffle": True, "caption.tag_dropout_rate": 0.1}, *overrides)
    assert config.caption_of(0) == config.caption
    second = config.caption_of(1)
    assert (second.shuffle, second.tag_dropout_rate, second.dropout_rate) == (False, 0.1, 0.2)


def test_a_seed_is_drawn_when_none_is_given(tmp_path):
    """A drawn seed differs each time and fits in 63 bits; a given or saved one is kept."""
    config = load(tmp_path)
    seeds = {with_seed(config).train.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert with_seed(config, 5).train.seed == 5
    assert with_seed(load(tmp_path, {"train.seed": 0}), 5).train.seed == 0
    assert config.train.seed is None


def assert_comes_back(config, folder):
    """The resolved config loads to the same settings for every data set."""
    path = folder / "resolved.toml"
    path.write_text(resolved_toml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert [again.caption_of(number) for number in range(len(again.data))] == [
        config.caption_of(n) for n in range(len(config.data))
    ]
    assert resolved_toml(again) == resolved_toml(config)


def test_resolved_config_names_every_setting(tmp_path):
    """The resolved config holds every setting, as a value or in a comment with the reason.

    `[cache]`, which no training reads, is there only if it is given.
    """
    assert "[cache]" not in resolved_toml(load(tmp_path))
    config = load(tmp_path, {"cache.images": "pictures"})
    sections = resolved_toml(config).split("\n\n")
    assert len(sections) == len(type(config).model_fields)
    for section, (name, value) in zip(sections, config, strict=True):
        header, *lines = section.strip().splitlines()
        assert header == ("[[data]]" if name == "data" else f"[{name}]")
        assert [line.removeprefix("# ").split(" ")[0] for line in lines] == list(
            type(value[0] if name == "data" else value).model_fields
        )


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({}, ()),
        ({"train.seed": (1 << 63) - 1, "checkpoint.every_minutes": 0.5, "text.clip_skip": 2}, ()),
        (
            {"loss.kind": "huber", "loss.huber_c": 1e-05, "log.trackers": ["wandb", "tensorboard"]},
            (),
        ),
        (
            {
                "optimizer.arguments": {
                    "betas": [0.9, 0.99],
                    "a b": {"c": True},
                    "eps": 1e-16,
                    "name": 'x"\\\n',
                }
            },
            (),
        ),
        (
            {
                "optimizer.schedule": "polynomial",
                "optimizer.schedule_arguments.power": 2,
                "text.max_tokens": "unlimited",
            },
            (),
        ),
        (
            {"caption.keep_tokens": 2},
            (*TWO_SETS, "data.1.caption.shuffle=true", "data.1.caption.separator=;"),
        ),
        (
            {"caption.shuffle": True, "caption.keep_tokens": 2},
            (*TWO_SETS, "data.1.caption.shuffle=false", "data.0.repeats=3"),
        ),
        ({"caption.shuffle": True, "data.caption": {"shuffle": False}}, ()),
        ({"train.output_dir": 'a "quoted" \\ path\x7f\U0001f600'}, ()),
    ],
)
def test_resolved_config_comes_back(tmp_path, settings, overrides):
    """The resolved config loads to an equal config, and resolves to the same text."""
    assert_comes_back(load(tmp_path, settings, *overrides), tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tmp_path, text):
    """No text in a setting breaks the resolved config."""
    config = load(tmp_path)
    arguments = {"name": text, text: [text]}
    optimizer = config.optimizer.model_copy(update={"arguments": arguments})
    again = tomllib.loads(resolved_toml(config.model_copy(update={"optimizer": optimizer})))
    assert again["optimizer"]["arguments"] == arguments


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("tiny_*.toml")), ids=lambda path: path.stem
)
def test_examples_load(path, tmp_path):
    """Each example loads, trains 20 steps of random weights, and comes back when resolved."""
    config = load_config(path)
    assert_comes_back(config, tmp_path)
    assert (config.model.path, config.model.size, config.train.max_steps) == ("random", "tiny", 20)
    assert f"tiny_{config.model.family}" == path.stem == config.train.output_dir.name
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"\n#   python -m trainer.run examples/{path.name}\n" in f"{head}\n"
    assert "\n#   capmerge rewrite examples/meta_lat.json\n" in head
    assert config.data[0].metadata == Path("examples/meta_lat_wildcard.json")


def test_there_is_an_example_of_each_family():
    """One for each model family."""
    assert [path.stem for path in sorted((ROOT / "examples").glob("tiny_*.toml"))] == [
        "tiny_sd1",
        "tiny_sd2",
        "tiny_sdxl",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train.batch_size", 1_000_000, "is 1000000, expected a whole number from 1 to 8192"),
        *(
            (setting, 10**20, f"is {10**20}, expected a ")
            for setting in (
                "caption.keep_tokens",
                "caption.token_warmup_min",
                "caption.dropout_every_epochs",
                "data.repeats",
                "text.max_tokens",
                "noise.multires_iterations",
                "optimizer.warmup_steps",
                "train.max_steps",
                "train.max_epochs",
                "train.seed",
                "train.accumulation",
                "train.workers",
                "ema.warmup_steps",
                "validation.every_steps",
                "validation.records",
                "checkpoint.every_steps",
                "checkpoint.every_epochs",
                "checkpoint.keep",
                "log.every_steps",
            )
        ),
        *(
            (setting, value, message)
            for setting in ("model.path", "data.metadata", "data.latents", "train.output_dir")
            for value, message in (
                ("x" * 300, "expected a path of at most 4,095 bytes whose names have at most 255"),
                ("x/" * 3000, "expected a path of at most 4,095 bytes"),
                ("a\0b", r'is "a\\u0000b", expected a path without NUL'),
            )
        ),
    ],
)
def test_values_past_any_use_are_refused(tmp_path, setting, value, message):
    """Counts and paths that would end in a traceback later are told as settings out of range."""
    with pytest.raises(ConfigError, match=re.escape(f"`{setting}` ") + f".*{message}"):
        load(tmp_path, {setting: value})


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000 + "]" * 5000,
        "optimizer.arguments.x = " + "[" * 100 + "]" * 100,
        "x" + ".x" * 3000 + " = 1",
        "train.max_steps = " + "9" * 5000,
    ],
)
def test_toml_past_any_use_is_refused(tmp_path, text):
    """Deep nesting and integers of thousands of digits are told, in the file and in `--set`."""
    assert re.search("cannot be read|more than 20 deep", refusal(tmp_path, text))
    assert refusal_of(tmp_path, text.replace(" = ", "=") if "." in text else f"train.{text}")


@pytest.mark.parametrize(
    ("table", "key", "ours"),
    [
        ("model", "pretrained_model_name_or_path", "model.path"),
        ("train", "train_batch_size", "train.batch_size"),
        ("optimizer", "lr_scheduler", "optimizer.schedule"),
        ("noise", "noise_offset", "noise.offset"),
    ],
)
def test_a_key_of_sd_scripts_is_translated(tmp_path, table, key, ours):
    """A key that sd-scripts has is told with the setting that decides the same here."""
    hint = f"That setting of sd-scripts is `{ours}` here."
    assert refusal_of(tmp_path, f"{table}.{key}=1") == (
        f"--set {table}.{key}=1: unknown key `{key}` in [{table}]. {hint}"
    )
    outside = f'{key} = "x"\n' + write(tmp_path / "c.toml", LEAST).read_text(encoding="utf-8")
    assert f"unknown key `{key}` outside of any section. {hint}" in refusal(tmp_path, outside)


def test_a_key_of_sd_scripts_without_a_counterpart_is_told(tmp_path):
    """A key that only sd-scripts has is told with the reason why it has no setting here."""
    assert refusal_of(tmp_path, "train.xformers=true").endswith(
        "unknown key `xformers` in [train]. sd-scripts has it, this trainer does not: "
        "the fastest kernel of torch is measured and used; speed.attention asks for another one."
    )
    assert "choose them with model.train_only and model.freeze." in refusal_of(
        tmp_path, "optimizer.block_lr=1"
    )


def test_a_word_for_a_list_is_shown_as_a_list(tmp_path):
    """A single word where a list belongs is answered with the list, quoted for the shell."""
    told = refusal_of(tmp_path, "log.trackers=tensorboard")
    assert told.endswith(
        'Write log.trackers = ["tensorboard"], or --set \'log.trackers=["tensorboard"]\'.'
    )
    assert load(tmp_path, {}, 'log.trackers=["tensorboard"]').log.trackers == ("tensorboard",)
